"""Reads values in published files as other tools spell them: true and false, labels, and numbers.

Each function accepts some spellings and refuses all others, so that an unknown spelling never becomes a valid value.
"""

from __future__ import annotations

import re
from typing import Any, Mapping, TypeVar

from drirl_jax.errors import InputError
from drirl_jax.runtime.surrogates import has_half_pair

T = TypeVar("T")
TRUTH = {"true": True, "t": True, "yes": True, "y": True, "1": True, "1.0": True}
TRUTH |= {"false": False, "f": False, "no": False, "n": False, "0": False, "0.0": False}
MAX_QUOTED = 60  # an error message quotes at most so many characters of a value


def label(name: str, value: Any, known: Mapping[str, T]) -> T:
    """The meaning of the value in `known`; case and blanks around it do not matter.

    Between words, "-" and "_" count as blanks.

    Args:
        name: of the column, for the error message.
        value: a text, a number or a boolean, compared by its usual spelling.
        known: spelling -> meaning.

    Raises:
        InputError: `known` has no such spelling.
    """
    spellings = {_spelling(spelling): meaning for spelling, meaning in known.items()}
    if isinstance(value, (str, int, float)) and _spelling(str(value)) in spellings:
        return spellings[_spelling(str(value))]
    raise InputError(f"{name} is {_quoted(value)}: known are {', '.join(map(repr, known))}.")


def truth(name: str, value: Any, words: Mapping[str, bool] | None = None) -> bool:
    """Whether the value means true, by the spellings of TRUTH and of `words`; see `label`."""
    return label(name, value, TRUTH | dict(words or {}))


def whole_number(name: str, value: Any, below: int) -> int:
    """A whole number n, 0 <= n < below, given as a number or as text.

    Raises:
        InputError: the value is no such number.
    """
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 <= number < below or number != int(number):
        raise InputError(f"{name} is {_quoted(value)}: it must be a whole number from 0 to {below - 1}.")
    return int(number)


def nonblank_text(name: str, value: Any) -> str:
    """The value, if it is a text that is not blank.

    Raises:
        InputError: it is no text, is blank, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} is of type {type(value).__name__}: make it a text.")
    if not value.strip():
        raise InputError(f"{name} is empty: write a text or drop the row.")
    if has_half_pair(value):
        raise InputError(f"{name} holds half a surrogate pair: write valid Unicode.")
    return value


def _spelling(text: str) -> str:
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", text.strip()).lower()


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"
