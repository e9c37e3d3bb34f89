"""Answers of `jobs/query.py` kept next to the store, so that a repeated question needs no counting code.

The key covers the capture's identity, its committed shards, the question, and the code and the libraries that answer
it: anything that could change an answer changes the key. Old answers are never wrong and may be deleted at any time.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.console.query_rows import Listed
from store.group import CaptureGroup
from store.identity import identity_hash
from store.names import beside
from store.objects import open_objects

if TYPE_CHECKING:
    from store.coverage import Coverage

ROOT = Path(__file__).parents[2]
CODE = ("analysis", "jobs/console", "store")
LIBRARIES = ("numpy", "scipy", "numba", "xarray")


def kept_answers(
    store: str, state: "Coverage", question: Mapping[str, Any], answer: Callable[[], Sequence[Listed]]
) -> Sequence[Listed]:
    """The kept answers to a question, otherwise computed ones, which are then kept.

    Parameters
    ----------
    store, state
        The store, and the state of the capture.
    question
        Plain values that can be written as JSON.
    answer
        Computes the answers.
    """
    identity = identity_hash(CaptureGroup(store, state.dataset).identity)
    asked = json.dumps([identity, state.digest, question, _code()], sort_keys=True)
    key = f"{state.dataset}/answers/{hashlib.sha256(asked.encode()).hexdigest()}.json"
    kept = open_objects(beside(store), scratch=".scratch")
    if (found := _read(kept.get(key))) is not None:
        return found
    made = answer()
    with suppress(OSError):  # if nothing can be written, the answer is returned anyway
        kept.put(key, json.dumps([asdict(each) for each in made], default=_plain).encode())
    return made


def _read(data: bytes | None) -> list[Listed] | None:
    """Answers, or None if they are not kept or incomplete."""
    try:
        return None if data is None else [Listed(**each) for each in json.loads(data)]
    except (ValueError, TypeError):
        return None


def _code() -> str:
    """A hash of the code that answers questions."""
    about = hashlib.sha256(" ".join(version(name) for name in LIBRARIES).encode())
    for folder in CODE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            about.update(file.read_bytes())
    return about.hexdigest()


def _plain(value: Any) -> Any:
    """A numpy number or array as a plain value for JSON."""
    return value.tolist()
