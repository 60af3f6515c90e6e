"""What a workdir remembers of its run: the config."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from drirl_jax.config import default
from drirl_jax.types import InputError


def remember(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes workdir/config.json, or checks that it says the same: a workdir belongs to one config, on any machines.

    Raises:
        InputError: the workdir holds a run of a different config; names the keys that differ.
    """
    if belongs(config, workdir):
        return
    path = workdir / "config.json"
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    plain = json.loads(config.to_json_best_effort(sort_keys=True))
    temporary.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


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


def _tuples(tree):
    """JSON has lists where a config has tuples."""
    if isinstance(tree, dict):
        return {name: _tuples(sub) for name, sub in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}{name}.").items()}
