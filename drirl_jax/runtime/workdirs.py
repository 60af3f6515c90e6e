"""What a workdir remembers of its run: the config, and what the files that it names hold."""

from __future__ import annotations

import json
import logging
import pathlib
import re
from typing import Any, Mapping, Sequence

from ml_collections import ConfigDict

from drirl_jax.config import default
from drirl_jax.runtime import bucket, json_files
from drirl_jax.runtime.files import expand_path, replace_file
from drirl_jax.types import InputError

log = logging.getLogger(__name__)

# What a run is made of beside its config: in words. A workdir keeps a hash of each.
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
}
POLICY = ("weights", "model", "tokenizer", "template", "ends")
# Options that only say where something lies: once its contents are known, they decide.
PLACES: dict[str, Sequence[str]] = {
    "data.path": ("data",),
    "policy.init": POLICY,
    "encoder.init": ("encoder",),
    "reward.init": ("rewards",),
    "evals.data": ("benchmarks",),
    "evals.classifier": ("classifier",),
    "model.init": POLICY,  # of an attack
    "options.autodan.templates": ("templates",),
    "options.selfcipher.demonstrations": ("demonstrations",),
}
# Options on which no number of a run depends.
ANYWHERE = (
    "mesh.", "sampler.mesh.", "distributed.", "guards.", "metrics.", "demos.endpoint.", "compilation_cache",
    "debug_nans",
)  # fmt: skip
TRANSPORT = re.compile(r"(^|\.)(endpoint|judge|attacker)\.(key_env|concurrency|timeout|retries|backoff)$")
# Files by which a folder is known to hold a run, even without a config.
TRACES = ("metrics.jsonl", "checkpoints", "rewards", "aligned")


def may_change(key: str, config: Mapping[str, Any]) -> bool:
    """Whether an option may change without another workdir: nothing that a run keeps depends on it.

    A judge that only evaluates may change, since what another judge has judged is judged anew. A judge that gives
    rewards, or figures while the policy learns, belongs to the run.

    Args:
        key: dotted.
        config: the options by dotted key.
    """
    if key.startswith(ANYWHERE) or TRANSPORT.search(key):
        return True
    if key.startswith("judge."):
        return config.get("reward.source") != "judge"
    if key.startswith("scaling.endpoint."):
        return config.get("scaling.split") != "llm"
    learns = bool(config.get("evals.every") and config.get("evals.benchmarks"))
    if key == "evals.judge" or key.startswith("evals.endpoint."):
        return config.get("reward.source") != "rules" and not learns
    return key in ("evals.judges", "evals.classifier") and not learns


def record_config(config: ConfigDict, workdir: pathlib.Path, now: Mapping[str, str] | None = None) -> None:
    """Writes workdir/config.json, or checks that it says the same: a workdir belongs to one config and to what the
    files that it names hold, on any machines and at any paths.

    Args:
        now: the hash of each thing that the config names: see CONTENTS.

    Raises:
        InputError: the workdir holds a run of a different config or of other contents; names which. Or it holds a run
            whose config.json is missing or damaged.
    """
    path, plain = workdir / "config.json", json.loads(config.to_json_best_effort(sort_keys=True))
    if check_config(config, workdir, now):
        before = json_files.load(path)
        if now and "contents" not in before:
            log.warning(
                "%s was begun by a version of drirl_jax that kept no hashes of data, model and tokenizer: those of now "
                "are taken for those of its beginning.", workdir,
            )  # fmt: skip
        plain["contents"] = before.get("contents", {}) | dict(now or {})
        if plain == before:
            return
    else:
        plain["contents"] = dict(now or {})
    if not plain["contents"]:
        del plain["contents"]
    workdir.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(plain, indent=1, sort_keys=True) + "\n")


def check_config(config: ConfigDict, workdir: pathlib.Path, now: Mapping[str, str] | None = None) -> bool:
    """Whether the workdir has this config and these contents; False where it holds no run. Raises InputError like
    `remember`."""
    path = workdir / "config.json"
    if not path.exists():
        if traces := [name for name in TRACES if (workdir / name).exists()]:
            raise InputError(
                f"{workdir} holds {', '.join(traces)} of a run, but no config.json that says of which: put that file "
                "back, or take another --workdir."
            )
        return False
    tree = _config_in(workdir)
    before, after = _flat({key: value for key, value in tree.items() if key != "contents"}), flat(config)
    known, now = tree.get("contents", {}), dict(now or {})
    same = {name for name in now if known.get(name) == now[name]}
    changed = [name for name in now if name in known and name not in same]
    if changed:
        what = ", ".join(CONTENTS[name].rstrip(",") for name in changed)
        raise InputError(
            f"{workdir} was begun with other contents of {what}: put back what was there then, or take another "
            "--workdir."
        )
    if only := sorted(before.keys() ^ after.keys()):
        raise InputError(
            f"{workdir} was begun by another version of drirl_jax, whose options are others ({', '.join(only[:5])}): "
            "go on with that version, or take another --workdir."
        )
    differ = [key for key in sorted(before) if before[key] != after[key]]
    differ = [key for key in differ if not (may_change(key, before) and may_change(key, after))]
    differ = [key for key in differ if not (key in PLACES and set(PLACES[key]) <= same)]
    if differ:
        changes = "; ".join(f"{key}: {before.get(key)!r} there, {after.get(key)!r} now" for key in differ)
        raise InputError(f"{workdir} holds a run of a different config ({changes}): take another --workdir.")
    return True


def require_same(workdir: bucket.Path, now: Mapping[str, str]) -> None:
    """Raises InputError unless the run in the workdir was made of these contents, as far as it has noted any."""
    known = _config_in(workdir).get("contents", {})
    changed = [CONTENTS[name].rstrip(",") for name in now if name in known and known[name] != now[name]]
    if changed:
        raise InputError(
            f"the run in {workdir} was made with other contents of {', '.join(changed)}: put back what was there then, "
            "or make the run anew."
        )


def recorded_contents(workdir: bucket.Path) -> dict[str, str]:
    """The hashes that the workdir keeps of what its run is made of; {} of an older version's."""
    return _config_in(workdir).get("contents", {})


def flat(config: ConfigDict) -> dict[str, Any]:
    """The options by dotted key, as JSON has them."""
    return _flat(json.loads(config.to_json_best_effort(sort_keys=True)))


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """The config that `remember` wrote. Raises InputError if there is none, or one that this version does not know."""
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"no config.json in {workdir}: name the workdir of a run.")
    tree = _config_in(workdir)
    tree.pop("contents", None)
    config = default()
    try:
        config.update(_tuples(tree))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is of another version of drirl_jax, or damaged ({error}): take the version that made the run, or "
            "make the run anew."
        ) from error
    return config


def _config_in(workdir: bucket.Path) -> dict:
    """What config.json says; "contents" in it is the hash of each thing by name."""
    path = workdir / "config.json"
    tree = json_files.load(path, hint="put a whole copy of the file there, or take another --workdir")
    if why := json_files.fault(tree.get("contents", {}), {...: str}, "contents"):
        raise InputError(f"{path} is damaged ({why}): put a whole copy of the file there, or take another --workdir.")
    return tree


def is_finished_run(path: pathlib.Path) -> bool:
    """Whether it is the workdir of a run that has come to its end."""
    return (path / "aligned").is_dir()


def policy_config(model: str, given: ConfigDict | None = None) -> ConfigDict:
    """The config under which a policy is measured or attacked.

    Args:
        model: the workdir of a finished run, whose aligned policy is meant, or whatever config.policy.init may be.
        given: of a run only its evals are taken; the rest is the run's own.
    """
    run = expand_path(model)
    if is_finished_run(run):
        config = load_config(run)
        config.evals.update({"best": "", "every": 0} | (given.evals.to_dict() if given is not None else {}))
    else:
        config = (given or default()).copy_and_resolve_references()
    config.policy.init = str(run / "aligned") if is_finished_run(run) else model
    return config


def _tuples(tree):
    """JSON has lists where a config has tuples."""
    if isinstance(tree, dict):
        return {name: _tuples(sub) for name, sub in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The dotted keys under which the two do not say the same."""
    one, other = _flat(before), _flat(now)
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}{name}.").items()}
