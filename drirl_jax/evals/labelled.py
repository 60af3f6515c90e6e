"""Responses that somebody has labelled: what a judge is fitted on, and what judges are compared with."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from drirl_jax.evals.items import field, table
from drirl_jax.types import InputError

ATTACKS = ("selfcipher",)  # sources of responses that are attacks
CLASSES = ("1_full_compliance", "3_partial_refusal", "2_full_refusal")  # XSTest's, in the order of judges.REFUSALS


class Labelled(NamedTuple):
    """A response with its label: unsafe or not, or an index into `judges.REFUSALS`; None where it has no such label."""

    prompt: str
    response: str
    unsafe: bool | None = None
    refusal: int | None = None
    attacked: bool = False
    split: str = ""


def read(path: pathlib.Path) -> list[Labelled]:
    """The labelled responses of a CSV, JSON or JSONL file, empty responses left out. Its rows have

    - response (or completion), goal (or prompt, which where there are both is the goal disguised), and unsafe (or
      human_majority, jailbroken): 1 or 0; or final_label, as XSTest's completions; if they like, split and attacked;
    - or a prompt with several responses: safe, unsafe and safe_under_attack, each a list of {text, source}, and split.

    Raises:
        InputError: there is no such file, or a row has no such columns.
    """
    found: list[Labelled] = []
    for where, row in table(path):
        prompt, split = field(where, row, "goal", "prompt"), row.get("split", "")
        if "safe" in row:
            for kind in ("safe", "unsafe", "safe_under_attack"):
                for said in row.get(kind, []):
                    attacked = kind == "safe_under_attack" or said.get("source") in ATTACKS
                    text = field(where, said, "text")
                    found.append(Labelled(prompt, text, unsafe=kind == "unsafe", attacked=attacked, split=split))
            continue
        response = field(where, row, "response", "completion")
        if "final_label" in row:
            if row["final_label"] not in CLASSES:
                raise InputError(f"{where}: final_label is {row['final_label']!r}: known are {', '.join(CLASSES)}.")
            found.append(Labelled(prompt, response, refusal=CLASSES.index(row["final_label"]), split=split))
            continue
        unsafe = str(field(where, row, "unsafe", "human_majority", "jailbroken")).lower() in ("1", "1.0", "true")
        attacked = str(row.get("attacked", False)).lower() in ("1", "true")
        found.append(Labelled(prompt, response, unsafe=unsafe, attacked=attacked, split=split))
    return [of for of in found if of.response.strip()]
