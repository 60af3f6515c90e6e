"""The one error that tells a user what to do. It stands alone, so that what needs no jax does not load it."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong: one sentence that says what, where and what to do.

    It often quotes what is wrong, or what a library says of it: what does not print (line ends, escapes that a terminal
    would obey, marks that turn the direction of writing) is a space in it.
    """

    def __init__(self, sentence: str):
        super().__init__("".join(c if c.isprintable() else " " for c in sentence))
