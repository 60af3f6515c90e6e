"""Responses that somebody has labelled: what a judge is fitted on, and what judges are compared with."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from drirl_jax.data import values
from drirl_jax.data.files import Row, field, table

ATTACKS = ("selfcipher",)  # sources of responses that are attacks
CLASSES = ("1_full_compliance", "3_partial_refusal", "2_full_refusal")  # XSTest's, in the order of judges.REFUSALS
HARMS = {"unsafe": True, "harmful": True, "jailbroken": True, "safe": False, "harmless": False}
SPLITS = {"training": "train", "validation": "valid", "val": "valid", "dev": "valid"}  # other names of ours


class Labelled(NamedTuple):
    """A response with its label: unsafe or not, or an index into `judges.REFUSALS`; None where it has no such label."""

    prompt: str
    response: str
    unsafe: bool | None = None
    refusal: int | None = None
    attacked: bool = False
    split: str = ""


def load_labels(path: pathlib.Path) -> list[Labelled]:
    """The labelled responses of a CSV, JSON or JSONL file, empty responses left out. Its rows have

    - response (or completion), goal (or prompt, which where there are both is the goal disguised), and unsafe (or
      human_majority, jailbroken) or safe (or is_safe): true or false, in a spelling of `values.TRUTH` or HARMS; or
      final_label, as XSTest's completions; if they like, split and attacked;
    - or a prompt with several responses: safe, unsafe and safe_under_attack, each a list of {text, source}, and split.

    Raises:
        InputError: there is no such file, a row has no such columns, or a label of another spelling.
    """
    found: list[Labelled] = []
    for where, row in table(path):
        found += _several(where, row) if isinstance(row.get("safe"), list) else _one(where, row)
    return [of for of in found if of.response.strip()]


def _several(where: str, row: Row) -> list[Labelled]:
    """The responses of a row that has lists of them."""
    prompt, split = field(where, row, "goal", "prompt"), _split(row)
    found = []
    for kind in ("safe", "unsafe", "safe_under_attack"):
        for answer in row.get(kind, []):
            attacked = kind == "safe_under_attack" or answer.get("source") in ATTACKS
            text = field(where, answer, "text")
            found.append(Labelled(prompt, text, unsafe=kind == "unsafe", attacked=attacked, split=split))
    return found


def _one(where: str, row: Row) -> list[Labelled]:
    """The response of a row that has one; none where it is blank."""
    prompt, response = field(where, row, "goal", "prompt"), field(where, row, "response", "completion")
    if not response.strip():
        return []
    if "final_label" in row:
        classes = {name: i for i, name in enumerate(CLASSES)}
        refusal = values.label(f"{where}: final_label", row["final_label"], classes)
        return [Labelled(prompt, response, refusal=refusal, split=_split(row))]
    if "safe" in row or "is_safe" in row:
        unsafe = not values.truth(f"{where}: safe", field(where, row, "safe", "is_safe"), _turned(HARMS))
    else:
        value = field(where, row, "unsafe", "human_majority", "jailbroken")
        unsafe = values.truth(f"{where}: unsafe", value, HARMS)
    attacked = values.truth(f"{where}: attacked", row.get("attacked", False))
    return [Labelled(prompt, response, unsafe=unsafe, attacked=attacked, split=_split(row))]


def _turned(words: dict[str, bool]) -> dict[str, bool]:
    return {word: not meaning for word, meaning in words.items()}


def _split(row: Row) -> str:
    name = str(row.get("split") or "").strip().lower()
    return SPLITS.get(name, name)
