"""Values of published files, as other tools write them: true and false, labels and numbers as words.

Each function knows some spellings and refuses all others, so that no unknown spelling becomes a valid value in silence.
"""

from __future__ import annotations

import re
from typing import Any, Mapping, TypeVar

from drirl_jax.runtime.surrogates import torn
from drirl_jax.types import InputError

T = TypeVar("T")
TRUTH = {"true": True, "t": True, "yes": True, "y": True, "1": True, "1.0": True}
TRUTH |= {"false": False, "f": False, "no": False, "n": False, "0": False, "0.0": False}
SHOWN = 60  # characters of a value that a sentence about it shows


def label(name: str, value: Any, known: Mapping[str, T]) -> T:
    """What the value means by `known`, whatever its case and the blanks around it.

    Between words "-" and "_" count as blanks.

    Args:
        name: of the column, for the sentence.
        value: a text, a number or a boolean, which is compared by its usual spelling.
        known: spelling -> meaning.

    Raises:
        InputError: no such spelling is known.
    """
    spellings = {_spelling(spelling): meaning for spelling, meaning in known.items()}
    if isinstance(value, (str, int, float)) and _spelling(str(value)) in spellings:
        return spellings[_spelling(str(value))]
    raise InputError(f"{name} is {_shown(value)}: known are {', '.join(map(repr, known))}.")


def truth(name: str, value: Any, words: Mapping[str, bool] | None = None) -> bool:
    """Whether the value is one of TRUTH's words for true, or one of `words`; see `label`."""
    return label(name, value, TRUTH | dict(words or {}))


def whole(name: str, value: Any, below: int) -> int:
    """A whole number from 0 up to `below`, as a number or as text.

    Raises:
        InputError: it is none of them.
    """
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 <= number < below or number != int(number):
        raise InputError(f"{name} is {_shown(value)}: it must be a whole number from 0 to {below - 1}.")
    return int(number)


def words(name: str, value: Any) -> str:
    """The value, if it is a text that says something.

    Raises:
        InputError: it is no text, or blank, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} is of type {type(value).__name__}: make it a text.")
    if not value.strip():
        raise InputError(f"{name} is empty: write a text or drop the row.")
    if torn(value):
        raise InputError(f"{name} holds half a surrogate pair: write valid Unicode.")
    return value


def _spelling(text: str) -> str:
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", text.strip()).lower()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
