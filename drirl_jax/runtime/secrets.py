"""A secret cut out of texts in every form that a server may repeat it in: as it is, escaped, in capitals, in base64."""

from __future__ import annotations

import base64
import html
import re
from typing import Callable

SHORTEST = 8  # characters; what is shorter guards nothing, and other forms of it stand in usual texts
COVER = "***"


def hider(secret: str) -> Callable[[str], str]:
    """A function that puts COVER in the place of an ASCII secret wherever a text holds it.

    From SHORTEST characters on also where it is escaped (in JSON, URLs, HTML, Python, once or twice), in other case,
    or in base64 or hexadecimal, alone or amid other bytes.
    """
    if not secret:
        return lambda text: text
    if len(secret) < SHORTEST:
        return lambda text: text.replace(secret, COVER)
    pattern = re.compile("|".join(["".join(map(_character, secret)), *_encoded(secret.encode())]), re.IGNORECASE)
    return lambda text: pattern.sub(COVER, text)


def _character(character: str) -> str:
    """A pattern of one character as it is and in its escapes."""
    code = ord(character)
    slashes = r"\\*" if character in "/\"'\\" else ""
    return (
        rf"(?:{slashes}{re.escape(character)}|{re.escape(html.escape(character))}|%(?:25)*{code:02x}|\\+u(?:00{code:02x}|\{{0*{code:x}\}})|\\+x{code:02x}"
        rf"|&(?:amp;)?\#(?:0*{code}|x0*{code:x});)"
    )


def _encoded(secret: bytes) -> list[str]:
    """Patterns of the secret in hexadecimal and in base64, as far as the bytes beside it do not change it."""
    patterns = [secret.hex()]
    for before in range(3):
        for kind in (base64.b64encode, base64.urlsafe_b64encode):
            text = kind(bytes(before) + secret).decode().rstrip("=")
            first, whole = -(-before * 8 // 6), (before + len(secret)) * 8 // 6
            patterns.append(re.escape(text[first:whole]))
    return patterns
