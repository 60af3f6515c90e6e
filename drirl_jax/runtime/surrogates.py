"""Half surrogate pairs: halves of an emoji that was cut in two. JSON can escape them, but UTF-8 cannot write them."""

from __future__ import annotations


def has_half_pair(text: str) -> bool:
    """Whether a text holds a half of a surrogate pair."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def without_half_pairs(text: str) -> str:
    """The text with U+FFFD instead of each half pair, and with whole pairs joined."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if has_half_pair(text) else text
