"""The parser of the commands that read their command line by argparse: convert, report, status."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose error is one sentence that ends with an advice.

    Args:
        command: its name behind `python -m drirl_jax`.
        page: the text of --help, printed with its line ends.
        advice: the end of an error's sentence.
    """

    def __init__(self, command: str, page: str | None, advice: str):
        super().__init__(
            f"python -m drirl_jax {command}",
            description=page,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.advice = advice

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 1 and one sentence."""
        sys.exit(f"drirl_jax: {message}: {self.advice}")
