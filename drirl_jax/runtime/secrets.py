"""Removes a secret from texts in every form in which a server may repeat it: plain, escaped, in capitals, in base64."""

from __future__ import annotations

import base64
import html
import re
from typing import Callable

SHORTEST = 8  # characters; a shorter key protects nothing, and its other forms appear in ordinary texts
COVER = "***"


def make_hider(secret: str) -> Callable[[str], str]:
    """A function that replaces an ASCII secret in a text with COVER.

    A secret of at least SHORTEST characters is also found in other case, escaped (in JSON, URLs, HTML or Python, once
    or twice), and in base64 or hexadecimal, alone or among other bytes.
    """
    if not secret:
        return lambda text: text
    if len(secret) < SHORTEST:
        return lambda text: text.replace(secret, COVER)
    pattern = re.compile("|".join(["".join(map(_character, secret)), *_encoded(secret.encode())]), re.IGNORECASE)
    return lambda text: pattern.sub(COVER, text)


def _character(character: str) -> str:
    """A pattern of one character, plain and in its escapes."""
    code = ord(character)
    slashes = r"\\*" if character in "/\"'\\" else ""
    return (
        rf"(?:{slashes}{re.escape(character)}|{re.escape(html.escape(character))}|%(?:25)*{code:02x}|\\+u(?:00{code:02x}|\{{0*{code:x}\}})|\\+x{code:02x}"
        rf"|&(?:amp;)?\#(?:0*{code}|x0*{code:x});)"
    )


def _encoded(secret: bytes) -> list[str]:
    """Patterns of the secret in hexadecimal and in base64, without the characters that neighbouring bytes change."""
    patterns = [secret.hex()]
    for offset in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(bytes(offset) + secret).decode().rstrip("=")
            first, end = -(-offset * 8 // 6), (offset + len(secret)) * 8 // 6
            patterns.append(re.escape(text[first:end]))
    return patterns
