"""Keep secrets out of everything that is written, logged and shown.

An address can hold a password, or a signature that grants access to anyone who has it (S3, a hub's servers), and errors
of libraries quote addresses. Secrets in captured texts or in file names are not found.
"""

import os
import re

VARIABLES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SHORTEST = 8  # characters of a secret; a shorter value could occur in ordinary words (arbitrary)
_USER = re.compile(r"(?<=://)[^\s/@'\"]*(?::[^\s@'\"]*)?@")
_QUERY = re.compile(r"(\b(?!s3:)[a-z][a-z0-9+.-]*://[^\s?#'\"<>]*)[?#][^\s'\"<>]*", re.IGNORECASE)  # S3's have none


def without_secrets(text: str) -> str:
    """A text without the values of `VARIABLES` and without the parts of its addresses before the host and after the
    path."""
    text = _QUERY.sub(r"\1?…", _USER.sub("…@", text))
    for value in filter(None, map(os.environ.get, VARIABLES)):
        if len(value) >= SHORTEST:
            text = text.replace(value, "…")
    return text
