"""Reads a value from a judge's reply in words: a grade on a scale, or a label, after its name.

The value is None where a reply names no value of the scale, or more than one. The caller then asks again. The thought
before a judge's answer (`thoughts.py`) is not read.
"""

from __future__ import annotations

import re
from typing import Mapping, Sequence, TypeVar

from drirl_jax.data import values
from drirl_jax.runtime.thoughts import without_thought

T = TypeVar("T")
LONGEST = 20_000  # characters; only the end of a longer reply is read

_AROUND = r"[\s\"'*_`]*"  # quotation marks, as in JSON, or Markdown around a name or a value
_START = r"(?<![^\W_])"  # the start of a name: not in the middle of a word
_NUMBER = r"[-+]?\d+(?:[.,]\d+)?(?:e[-+]?\d+)?"
_WHOLE = r"(?![\d%])(?![.,]\d)(?!\s*[-+*=^]\s*\d)(?!\s*(?:or|to)\s*\d)"  # after a number: nothing that changes it
_MARKUP = re.compile(r"[*`_]+|\\boxed|[{}$]")  # around a number alone
_ENDS = " \t\r\n,.:;\"'"


def _plain(text: str) -> str:
    """The end of the answer, with plain minus signs, colons and quotation marks."""
    return without_thought(text)[-LONGEST:].translate(str.maketrans("−：＝“”‘’", "-:=\"\"''"))


def _number(text: str, low: int, high: int) -> int | None:
    """The whole number in the text, if it is on the scale; else None."""
    try:
        number = float(text.replace(",", "x"))
    except (ValueError, OverflowError):
        return None
    return int(number) if low <= number <= high and number == int(number) else None


def _text_after(name: str, text: str, other_names: Sequence[str] = ()) -> str | None:
    """The text after the last "name:", up to the end of the line or another name; None where there is no "name:"."""
    parts = re.split(rf"{_START}{name}{_AROUND}[:=]", _plain(text), flags=re.IGNORECASE)
    if len(parts) == 1:
        return None
    line = parts[-1].lstrip("\"'*_` \t\r\n").partition("\n")[0]
    for other in other_names:
        line = re.split(rf"{_START}{other}{_AROUND}[:=]", line, flags=re.IGNORECASE)[0]
    return line


def grade_after(name: str, text: str, low: int, high: int, other_names: Sequence[str] = ()) -> int | None:
    """The whole number from `low` to `high` after the last "name:", alone or out of `high`; None where there is none.

    Words may follow it. Another number may follow only in parentheses. On a scale from 0 to 1 true, false, yes and no
    count too.

    Args:
        other_names: names of other values that may stand on the same line.
    """
    line = _text_after(name, text, other_names)
    if line is None:
        return None
    if (low, high) == (0, 1) and (word := re.match(r"(true|false|yes|no)\b(?!\s*(?:\?|/|or\b))", line, re.IGNORECASE)):
        return int(values.truth(name, word[1]))
    line = re.sub(r"\([^()]*\)", "", line)
    match = re.match(rf"({_NUMBER}){_WHOLE}(?:\s*(?:/|out of)\s*{high}(?!\d))?", line, re.IGNORECASE)
    if match is None or re.search(r"\d", line[match.end() :]) or line[match.end() :].lstrip().startswith("?"):
        return None
    return _number(match[1], low, high)


def label_after(name: str, text: str, known: Mapping[str, T]) -> T | None:
    """The meaning of the label after the last "name:"; None where there is none.

    Punctuation must follow the label directly, or its line must end: "full answer", "full?" and "full or partial" do
    not name the label "full".

    Args:
        known: {spelling: meaning}.
    """
    line = _text_after(name, text)
    if line is None:
        return None
    spellings = {re.escape(spelling).replace(r"\ ", r"[\s_-]+"): meaning for spelling, meaning in known.items()}
    label = "|".join(sorted(spellings, key=len, reverse=True))
    whole, alone = r"(?![^\W_]|-\w)", rf"(?!\W*(?:{label})\b)"
    match = re.match(rf"({label}){whole}{alone}{_AROUND}(?=$|[-.,;:!)}}\]|(–—])", line, re.IGNORECASE)
    if match is None:
        return None
    return next(meaning for spelling, meaning in spellings.items() if re.fullmatch(spelling, match[1], re.IGNORECASE))


def grade_alone(text: str, high: int) -> int | None:
    """The whole number from 0 to `high` that a reply consists of, or that it names as its grade.

    These forms are read: a number as the first line ("8", "**8**/10", "8 - it declines"), a number after a name
    ("Grade: 8", "a score of 8"), a number out of `high` ("8 out of 10"), and a number after the last line's colon. The
    result is None where their numbers differ. The bounds of the scale ("on a scale of 0 to 10") are no grade.
    """
    scale = rf"(?<!\d)0\s*(?:to|-|–|and|through)\s*{high}(?!\d)"
    text = re.sub(rf"(?:on )?(?:an? |the )?(?:scale )?(?:of |from |between )?{scale}", " ", _plain(text), flags=re.I)
    out_of = rf"\s*(?:/|out of)\s*{high}(?![\d.,]*\d)"
    other_scale = rf"(?!\s*(?:/|out of)\s*(?!{high}(?!\d))\d)"
    name = rf"{_START}(?:grade|rating|score|mark){_AROUND}(?:[:=]|\b(?:is|was|of)\b){_AROUND}"
    named = rf"{name}({_NUMBER}){_WHOLE}{other_scale}"
    lines = [_MARKUP.sub("", line).strip(_ENDS) for line in text.strip(_ENDS).splitlines()] or [""]
    matches = [
        re.fullmatch(rf"({_NUMBER})(?:{out_of})?(?:\s+points?)?(?:\s*[-–—,;(]\D*)?", lines[0], re.IGNORECASE),
        re.search(rf":\s*({_NUMBER})(?:{out_of})?$", lines[-1], re.IGNORECASE),
        *list(re.finditer(named, text, re.IGNORECASE))[-1:],
        *re.finditer(rf"(?<![\w.,–-])({_NUMBER}){out_of}", text, re.IGNORECASE),
    ]
    grades = {_number(match[1], 0, high) for match in matches if match is not None}
    return grades.pop() if len(grades) == 1 else None
