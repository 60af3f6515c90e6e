"""What a workdir remembers of its run: the config."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from drirl_jax.config import default
from drirl_jax.runtime.files import place, replace_file
from drirl_jax.types import InputError


def remember(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes workdir/config.json, or checks that it says the same: a workdir belongs to one config, on any machines.

    Raises:
        InputError: the workdir holds a run of a different config; names the keys that differ.
    """
    if belongs(config, workdir):
        return
    path = workdir / "config.json"
    plain = json.loads(config.to_json_best_effort(sort_keys=True))
    replace_file(path, json.dumps(plain, indent=1, sort_keys=True) + "\n")


def belongs(config: ConfigDict, workdir: pathlib.Path) -> bool:
    """Whether the workdir has this config; False where it has none. Raises InputError like `remember`."""
    path = workdir / "config.json"
    if not path.exists():
        return False
    before, after = _flat(json.loads(path.read_text())), flat(config)
    differ = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    differ = [k for k in differ if not k.startswith(("mesh.", "sampler.mesh.", "distributed.", "guards.", "metrics."))]
    if differ:
        changes = "; ".join(f"{k}: {before.get(k)!r} there, {after.get(k)!r} now" for k in differ)
        raise InputError(f"{workdir} holds a run of a different config ({changes}): take another --workdir.")
    return True


def flat(config: ConfigDict) -> dict[str, Any]:
    """The options by dotted key, as JSON has them."""
    return _flat(json.loads(config.to_json_best_effort(sort_keys=True)))


def recall(workdir: pathlib.Path) -> ConfigDict:
    """The config that `remember` wrote. Raises InputError if there is none, or one that this version does not know."""
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"no config.json in {workdir}: name the workdir of a run.")
    config = default()
    try:
        config.update(_tuples(json.loads(path.read_text())))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is of another version of drirl_jax ({error}).") from error
    return config


def is_run(path: pathlib.Path) -> bool:
    """Whether it is the workdir of a run that has come to its end."""
    return (path / "aligned").is_dir()


def of_policy(model: str, given: ConfigDict | None = None) -> ConfigDict:
    """The config under which a policy is measured or attacked.

    Args:
        model: the workdir of a finished run, whose aligned policy is meant, or whatever config.policy.init may be.
        given: of a run only its evals are taken; the rest is the run's own.
    """
    run = place(model)
    if is_run(run):
        config = recall(run)
        config.evals.update({"best": "", "every": 0} | (given.evals.to_dict() if given is not None else {}))
    else:
        config = (given or default()).copy_and_resolve_references()
    config.policy.init = str(run / "aligned") if is_run(run) else model
    return config


def stamp(model: pathlib.Path) -> str:
    """A hash of a model's weights: another one where they were trained anew, the same where they were copied."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(model.glob("*.safetensors")) if model.is_dir() else [model]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _tuples(tree):
    """JSON has lists where a config has tuples."""
    if isinstance(tree, dict):
        return {name: _tuples(sub) for name, sub in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}{name}.").items()}
