"""Text of data sets and tokenizers, escaped for pages and their scripts."""

from __future__ import annotations

import base64
import hashlib
import json

from markupsafe import Markup


def visible(text: str, keep: str = "") -> str:
    r"""Text with invisible characters (controls, line separators, direction marks, surrogates) as `\uXXXX`.

    Characters in `keep` are not changed.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def inert_json(data: object) -> Markup:
    """JSON that is inert inside a script element, whatever text it contains: no `<`, `>`, `&`, no U+2028."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only: U+2028 and bidi marks are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def policy_hash(script: str) -> str:
    """The hash by which a content-security policy allows a script or style sheet."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
