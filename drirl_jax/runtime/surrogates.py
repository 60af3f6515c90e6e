"""Half surrogate pairs: what an emoji leaves that was cut in two, which JSON can escape and UTF-8 cannot write."""

from __future__ import annotations


def torn(text: str) -> bool:
    """Whether a text holds half of a surrogate pair."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def mended(text: str) -> str:
    """The text with U+FFFD in the place of each half pair, and whole pairs joined."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if torn(text) else text
