"""What a workdir records about its run: the config, and hashes of the contents of the files that it names."""

from __future__ import annotations

import json
import logging
import pathlib
import re
from typing import Any, Mapping, Sequence

from ml_collections import ConfigDict

from drirl_jax.config import default
from drirl_jax.runtime import bucket, json_files, keys
from drirl_jax.runtime.files import expand_path, replace_file
from drirl_jax.types import InputError

log = logging.getLogger(__name__)

# The inputs of a run besides its config -> their names in messages. A workdir keeps a hash of each.
CONTENTS = {
    "data": "the records of config.data.path",
    "weights": "the weights of config.policy.init",
    "model": "config.json of config.policy.init",
    "tokenizer": "the tokenizer of config.policy.init",
    "template": "the chat template of config.policy.init, or its special tokens,",
    "ends": "the tokens that end a response of config.policy.init",
    "encoder": "the text encoder of config.encoder.init",
    "rewards": "the rewards of config.reward.init",
    "benchmarks": "the items of config.evals.benchmarks",
    "classifier": "the judge's file config.evals.classifier",
    "templates": "the file options.autodan.templates",
    "demonstrations": "the file options.selfcipher.demonstrations",
    "answers": "the file options.prefill.answers",
}
POLICY = ("weights", "model", "tokenizer", "template", "ends")
# Options that only say where an input lies -> that input. Where its hash is recorded, the hash is compared instead.
PLACES: dict[str, Sequence[str]] = {
    "data.path": ("data",),
    "policy.init": POLICY,
    "encoder.init": ("encoder",),
    "reward.init": ("rewards",),
    "evals.data": ("benchmarks",),
    "evals.classifier": ("classifier",),
    "model.init": POLICY,  # an option of attacks
    "options.autodan.templates": ("templates",),
    "options.selfcipher.demonstrations": ("demonstrations",),
    "options.prefill.answers": ("answers",),
}
# Options that change no number of a run.
ANYWHERE = (
    "mesh.", "sampler.mesh.", "distributed.", "guards.", "metrics.", "demos.endpoint.", "compilation_cache",
    "debug_nans",
)  # fmt: skip
TRANSPORT = re.compile(r"(^|\.)(endpoint|judge|attacker)\.(key_env|concurrency|timeout|retries|backoff)$")
# Files that show that a folder holds a run, even without config.json.
TRACES = ("metrics.jsonl", "checkpoints", "rewards", "aligned")


def may_change(key: str, config: Mapping[str, Any]) -> bool:
    """Whether an option may change in the same workdir, because nothing that a run saves depends on it.

    A judge that only evaluates may change, because the new judge judges everything again. A judge that gives rewards,
    or figures while the policy learns, belongs to the run.

    Args:
        key: dotted.
        config: the options by dotted key.
    """
    if key.startswith(ANYWHERE) or TRANSPORT.search(key):
        return True
    if key.startswith("reward.endpoint."):
        return config.get("reward.source") != "judge"
    if key.startswith("scaling.endpoint."):
        return config.get("scaling.split") != "llm"
    evaluates_during_training = bool(config.get("evals.every") and config.get("evals.benchmarks"))
    if key == "evals.judges" or key.startswith("evals.endpoint."):
        return config.get("reward.source") != "rules" and not evaluates_during_training
    return key == "evals.classifier" and not evaluates_during_training


def record_config(config: ConfigDict, workdir: pathlib.Path, present: Mapping[str, str] | None = None) -> None:
    """Writes workdir/config.json, or checks that it is the same. A workdir belongs to one config and to the contents of
    the files that the config names, on any machine and at any path.

    Args:
        present: the present hash of each input that the config names: see CONTENTS.

    Raises:
        InputError: the workdir holds a run of a different config or of other contents; the message names them. Or it
            holds a run whose config.json is missing or damaged.
    """
    path, record = workdir / "config.json", json.loads(config.to_json_best_effort(sort_keys=True))
    if check_config(config, workdir, present):
        recorded = json_files.load(path)
        if present and "contents" not in recorded:
            log.warning(
                "%s was begun by a version of drirl_jax that kept no hashes of data, model and tokenizer: they are "
                "assumed to be unchanged since.", workdir,
            )  # fmt: skip
        record["contents"] = recorded.get("contents", {}) | dict(present or {})
        if record == recorded:
            return
    else:
        record["contents"] = dict(present or {})
    if not record["contents"]:
        del record["contents"]
    workdir.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def check_config(config: ConfigDict, workdir: pathlib.Path, present: Mapping[str, str] | None = None) -> bool:
    """True if the workdir has this config and these contents, False if it holds no run. Raises InputError like
    `record_config`."""
    path = workdir / "config.json"
    if not path.exists():
        if traces := [name for name in TRACES if (workdir / name).exists()]:
            raise InputError(
                f"{workdir} holds {', '.join(traces)} of a run, but no config.json: put that file back, or take "
                "another --workdir."
            )
        return False
    tree = _config_in(workdir)
    recorded_options, present_options = (
        _flat({key: value for key, value in tree.items() if key != "contents"}),
        flat_options(config),
    )
    recorded, present = tree.get("contents", {}), dict(present or {})
    same = {name for name in present if recorded.get(name) == present[name]}
    changed = [name for name in present if name in recorded and name not in same]
    if changed:
        inputs = ", ".join(CONTENTS[name].rstrip(",") for name in changed)
        raise InputError(
            f"{workdir} was begun with other contents of {inputs}: put back what was there then, or take another "
            "--workdir."
        )
    if differences := keys.differences(recorded_options, present_options):
        raise InputError(
            f"{workdir} was begun by another version of drirl_jax, whose options are others "
            f"({differences}): go on with that version, or take another --workdir."
        )
    changed_options = [key for key in sorted(recorded_options) if recorded_options[key] != present_options[key]]
    changed_options = [
        key for key in changed_options if not (may_change(key, recorded_options) and may_change(key, present_options))
    ]
    changed_options = [key for key in changed_options if not (key in PLACES and set(PLACES[key]) <= same)]
    if changed_options:
        changes = "; ".join(
            f"{key}: {recorded_options.get(key)!r} there, {present_options.get(key)!r} now" for key in changed_options
        )
        raise InputError(f"{workdir} holds a run of a different config ({changes}): take another --workdir.")
    return True


def require_same(workdir: bucket.Path, present: Mapping[str, str]) -> None:
    """Raises InputError if a hash that the run in the workdir has recorded differs from the present one."""
    recorded = _config_in(workdir).get("contents", {})
    changed = [CONTENTS[name].rstrip(",") for name in present if name in recorded and recorded[name] != present[name]]
    if changed:
        raise InputError(
            f"the run in {workdir} was made with other contents of {', '.join(changed)}: put back what was there then, "
            "or make the run anew."
        )


def recorded_contents(workdir: bucket.Path) -> dict[str, str]:
    """The recorded hashes of the run's inputs; {} if an older version made the workdir."""
    return _config_in(workdir).get("contents", {})


def flat_options(config: ConfigDict) -> dict[str, Any]:
    """The options by dotted key, with their values in JSON's types."""
    return _flat(json.loads(config.to_json_best_effort(sort_keys=True)))


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """The config that `record_config` wrote. Raises InputError if there is none, or another version's."""
    path = workdir / "config.json"
    json_files.need_run(workdir)
    tree = _config_in(workdir)
    tree.pop("contents", None)
    config = default()
    try:
        config.update(_tuples(tree))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        reason = keys.differences(_flat(tree), flat_options(default())) or error
        raise InputError(
            f"{path} is of another version of drirl_jax, or damaged ({reason}): take the version that made the run, or "
            "make the run anew."
        ) from error
    return config


def _config_in(workdir: bucket.Path) -> dict:
    """The value of config.json; its "contents" holds the hash of each input by name."""
    path = workdir / "config.json"
    tree = json_files.load(path, hint="put a whole copy of the file there, or take another --workdir")
    if reason := json_files.fault(tree.get("contents", {}), {...: str}, "contents"):
        raise InputError(
            f"{path} is damaged ({reason}): put a whole copy of the file there, or take another --workdir."
        )
    return tree


def is_finished_run(path: pathlib.Path) -> bool:
    """Whether the path is the workdir of a run that has written its aligned model."""
    return (path / "aligned").is_dir()


def policy_config(model: str, user_config: ConfigDict | None = None) -> ConfigDict:
    """The config with which a policy is evaluated or attacked.

    Args:
        model: the workdir of a finished run, for its aligned policy; or any value that config.policy.init can have.
        user_config: the user's config. For a run only its section evals is used; the rest is the run's own.
    """
    run = expand_path(model)
    if is_finished_run(run):
        config = load_config(run)
        config.evals.update({"best": "", "every": 0} | (user_config.evals.to_dict() if user_config is not None else {}))
    else:
        config = (user_config or default()).copy_and_resolve_references()
    config.policy.init = str(run / "aligned") if is_finished_run(run) else model
    return config


def _tuples(tree):
    """The tree with tuples instead of JSON's lists, as configs have them."""
    if isinstance(tree, dict):
        return {name: _tuples(subtree) for name, subtree in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree


def differing_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The dotted keys whose values differ between the two, or that only one of them has."""
    flat_before, flat_now = _flat(before), _flat(now)
    return sorted(key for key in flat_before.keys() | flat_now.keys() if flat_before.get(key) != flat_now.get(key))


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, subtree in tree.items() for key, value in _flat(subtree, f"{prefix}{name}.").items()}
