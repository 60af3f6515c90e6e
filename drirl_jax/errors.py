"""The one error for wrong input of the user. It has its own module, which does not load jax."""

from __future__ import annotations


class InputError(ValueError):
    """The user's input is wrong. The message is one sentence: what is wrong, where, and what to do.

    It often quotes the input or an error of a library. A space replaces each character that is not printable (line
    ends, escapes that control a terminal, marks that turn the direction of writing).
    """

    def __init__(self, sentence: str):
        super().__init__("".join(c if c.isprintable() else " " for c in sentence))
