"""Dotted keys of a config, such as align.steps: those of older versions, and the nearest to one that does not exist."""

from __future__ import annotations

import difflib
from typing import Any, Collection, Iterator, Mapping, Sequence

from ml_collections import ConfigDict

# A key of an older version, or a section with all its keys -> what has replaced it; None: nothing.
OLD_KEYS: dict[str, str | None] = {
    "align.group": "align.group_size",
    "align.optimizer.name": None,
    "demos.separator": None,
    "evals.judge": "evals.judges",
    "grpo.beta_kl": "policy_loss.beta_kl",
    "grpo.clip_high": "policy_loss.clip_high",
    "grpo.clip_low": "policy_loss.clip_low",
    "grpo.contrast": "group.contrast",
    "grpo.demonstration": "group.demonstration",
    "grpo.eps": "group.eps",
    "grpo.harmless_wrong": "group.harmless_refusals",
    "grpo.ratio": "policy_loss.ratio",
    "grpo.reduce": "policy_loss.reduce",
    "irl.optimizer.name": None,
    "judge": "reward.endpoint",
    "sampler.batch": "data.mixing",
    "sampler.harmless_share": "data.harmless_share",
    "scaling.align": "scaling.mean_over",
}
MOST = 4  # keys that an advice names


def dotted(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted key of every option of a config."""
    for name, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def successor(key: str) -> tuple[bool, str | None]:
    """(whether it is a key of an older version, the key that has replaced it, or None)."""
    for old, new in OLD_KEYS.items():
        if f"{key}.".startswith(f"{old}."):
            return True, new and new + key.removeprefix(old)
    return False, None


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """The keys that a misspelt key may stand for: those of its section that are like it, or else those with its last
    name, or else any that are like it; nearest first.

    Args:
        key: dotted; it is not among `known`.
        known: the keys that exist.
    """
    section, _, name = key.rpartition(".")
    beside = [other.removeprefix(f"{section}.") for other in known if section and other.startswith(f"{section}.")]
    if close := difflib.get_close_matches(name, beside, MOST):
        return [f"{section}.{other}" for other in close]
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    likeness = {other: difflib.SequenceMatcher(None, key, other).ratio() for other in same_name}
    return sorted(same_name, key=likeness.__getitem__, reverse=True)[:MOST] or difflib.get_close_matches(
        key, known, MOST, cutoff=0.75
    )


def advice(key: str, known: Sequence[str]) -> str:
    """What to write instead of a key that does not exist, as the end of a sentence."""
    is_old, new = successor(key)
    if is_old:
        return f"it is {new} in this version." if new else "this version has no such option."
    close = nearest(key, known)
    return f"did you mean {' or '.join(close)}?" if close else "--help lists all options."


def differences(recorded: Collection[str], present: Collection[str]) -> str:
    """The keys that a workdir and this version do not share: those that were renamed with their new names, then others.

    Returns:
        at most MOST of them, as a list for a message; "" if all are shared.
    """
    successors = {key: successor(key)[1] for key in sorted(set(recorded) - set(present))}
    renamed = [f"{old} is now {new}" for old, new in successors.items() if new in present]
    others = [key for key, new in successors.items() if new not in present]
    others += sorted(set(present) - set(recorded) - set(successors.values()))
    return ", ".join((renamed + others)[:MOST])
