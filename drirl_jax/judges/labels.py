"""Labelled responses: a judge is fitted on them, and judges are compared with them."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from drirl_jax.data import values
from drirl_jax.data.files import Row, first_column, read_table

ATTACKS = ("selfcipher",)  # these sources of responses are attacks
CLASSES = ("1_full_compliance", "3_partial_refusal", "2_full_refusal")  # of XSTest, in the order of judges.REFUSALS
HARM_WORDS = {"unsafe": True, "harmful": True, "jailbroken": True, "safe": False, "harmless": False}
SPLITS = {"training": "train", "validation": "valid", "val": "valid", "dev": "valid"}  # other names of our splits


class Labelled(NamedTuple):
    """A response with a label: unsafe or not, or an index into `judges.REFUSALS`. The other label is None."""

    prompt: str
    response: str
    unsafe: bool | None = None
    refusal: int | None = None
    attacked: bool = False
    split: str = ""


def load_labels(path: pathlib.Path) -> list[Labelled]:
    """The labelled responses of a CSV, JSON or JSONL file, without empty responses. A row has one of two forms:

    - One response: response (or completion), goal (or prompt; where a row has both, the prompt is the disguised goal),
      and a label. The label is unsafe (or human_majority, jailbroken) or safe (or is_safe), true or false in a spelling
      of `values.TRUTH` or HARM_WORDS; or final_label, as in XSTest's completions. split and attacked are optional.
    - A prompt with several responses: safe, unsafe and safe_under_attack, each a list of {text, source}, and split.

    Raises:
        InputError: the file does not exist, or a row has no such columns or a label in another spelling.
    """
    labelled: list[Labelled] = []
    for where, row in read_table(path):
        labelled += _several_responses(where, row) if isinstance(row.get("safe"), list) else _one_response(where, row)
    return [example for example in labelled if example.response.strip()]


def _several_responses(where: str, row: Row) -> list[Labelled]:
    """The labelled responses of a row with lists of responses."""
    prompt, split = first_column(where, row, "goal", "prompt"), _split(row)
    labelled = []
    for kind in ("safe", "unsafe", "safe_under_attack"):
        for answer in row.get(kind, []):
            attacked = kind == "safe_under_attack" or answer.get("source") in ATTACKS
            text = first_column(where, answer, "text")
            labelled.append(Labelled(prompt, text, unsafe=kind == "unsafe", attacked=attacked, split=split))
    return labelled


def _one_response(where: str, row: Row) -> list[Labelled]:
    """The labelled response of a row with one response; [] where it is blank."""
    prompt, response = first_column(where, row, "goal", "prompt"), first_column(where, row, "response", "completion")
    if not response.strip():
        return []
    if "final_label" in row:
        classes = {name: i for i, name in enumerate(CLASSES)}
        refusal = values.label(f"{where}: final_label", row["final_label"], classes)
        return [Labelled(prompt, response, refusal=refusal, split=_split(row))]
    if "safe" in row or "is_safe" in row:
        unsafe = not values.truth(f"{where}: safe", first_column(where, row, "safe", "is_safe"), _negate(HARM_WORDS))
    else:
        value = first_column(where, row, "unsafe", "human_majority", "jailbroken")
        unsafe = values.truth(f"{where}: unsafe", value, HARM_WORDS)
    attacked = values.truth(f"{where}: attacked", row.get("attacked", False))
    return [Labelled(prompt, response, unsafe=unsafe, attacked=attacked, split=_split(row))]


def _negate(meanings: dict[str, bool]) -> dict[str, bool]:
    return {word: not meaning for word, meaning in meanings.items()}


def _split(row: Row) -> str:
    name = str(row.get("split") or "").strip().lower()
    return SPLITS.get(name, name)
