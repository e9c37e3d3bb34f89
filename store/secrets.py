"""Secrets kept out of what is written, logged and shown.

An address can hold a password, or a signature that lets whoever has it read (of S3, of a hub's servers); errors of
libraries quote addresses. Not known here: a secret that stands in a text that was captured, or in a file's name.
"""

import os
import re

VARIABLES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SHORTEST = 8  # characters of a secret; a shorter value would be found in ordinary words (arbitrary)
_USER = re.compile(r"(?<=://)[^\s/@'\"]*(?::[^\s@'\"]*)?@")
_QUERY = re.compile(r"(\b(?!s3:)[a-z][a-z0-9+.-]*://[^\s?#'\"<>]*)[?#][^\s'\"<>]*", re.IGNORECASE)  # S3's have none


def without_secrets(text: str) -> str:
    """A text without what its addresses hold before their host and after their path, nor the values of `VARIABLES`."""
    text = _QUERY.sub(r"\1?…", _USER.sub("…@", text))
    for value in filter(None, map(os.environ.get, VARIABLES)):
        if len(value) >= SHORTEST:
            text = text.replace(value, "…")
    return text
