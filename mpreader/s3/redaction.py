"""Redaction: texts of other libraries, made fit for an error's message: one line, bounded, without secrets.

Used for every text that botocore, a credential provider or a service wrote. Pure. A library's error may repeat what it
was given: a credential process's output, a service's document with keys in it, a signed URL, an Authorization header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["redacted"]

_MAX_CHARACTERS: Final = 400
# Longest text that is searched for secrets at all; a service may send megabytes, and a search takes time by the square.
_MAX_SEARCHED: Final = 4_000
_NAMES_OF_SECRETS: Final = (
    r"(?:\w*secret\w*|\w*token\w*|\w*password\w*|signature|credential|access_?key_?id|x-amz-[\w-]+)"
)
# Each with the replacement for what it finds. The order matters: queries first, since they hold the others.
_PATTERNS: Final = (
    # urllib3 begins its reasons with the repr of an object, which is of no use to a user.
    (re.compile(r"<urllib3\S* object at \w+>: |\w+Connection(?:Pool)?\([^)]*\): "), ""),
    (re.compile(r"(\w+://)[^/\s@'\"]*@"), r"\1"),  # user name and password of a URL
    (re.compile(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*"), r"\1?…"),
    # name=value, "name": "value", <name>value</name>; in "name: value" a plain word is none.
    (re.compile(rf"(?i)(\b{_NAMES_OF_SECRETS}(?:['\"]?[=>]['\"]?|['\"]\s*:\s*['\"]))[^\s'\"<>,;&)}}]{{4,}}"), r"\1…"),
    (re.compile(rf"(?i)(\b{_NAMES_OF_SECRETS}:\s*)(?=\S*\d|\S{{16,}})[^\s'\"<>,;&)}}]{{4,}}"), r"\1…"),
    (re.compile(r"\b(?:AKIA|ASIA|AROA)[A-Z0-9]{12,}\b"), "…"),
    # Words that no language has: long, with upper case, lower case and digits, such as keys, tokens and signatures.
    (
        re.compile(
            r"(?<![A-Za-z0-9+=])(?=[A-Za-z0-9+=]*[a-z])(?=[A-Za-z0-9+=]*[A-Z])(?=[A-Za-z0-9+=]*[0-9])[A-Za-z0-9+=]{20,}"
        ),
        "…",
    ),
    (re.compile(r"\b[0-9a-f]{40,}\b"), "…"),
)


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """Return ``text`` in one line of at most 400 characters, with ``…`` in place of what may be a secret.

    Args:
        text: Text of another library or of a service.
        secrets: Secrets that are known: they are removed wherever they stand.
    """
    text = text[:_MAX_SEARCHED]
    for secret in secrets:
        text = text.replace(secret, "…")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
