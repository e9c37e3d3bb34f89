"""Answers of `jobs/query.py` kept beside the store: a question that was asked before loads nothing that counts.

The key is made of the capture's identity, of what of it is committed, of the question, and of the code and the
libraries that answer it: whatever could change an answer makes another key. Old answers are never wrong and may be
deleted at any time.
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
    """What is kept of a question, else what answers it, which is kept then.

    Parameters
    ----------
    store, state
        The store, and what there is of the capture that is asked.
    question
        Plain values, of which JSON can be made.
    answer
        Answers it.
    """
    identity = identity_hash(CaptureGroup(store, state.dataset).identity)
    asked = json.dumps([identity, state.digest, question, _code()], sort_keys=True)
    key = f"{state.dataset}/answers/{hashlib.sha256(asked.encode()).hexdigest()}.json"
    kept = open_objects(beside(store), scratch=".scratch")
    if (found := _read(kept.get(key))) is not None:
        return found
    made = answer()
    with suppress(OSError):  # where nothing can be written the answer is given all the same
        kept.put(key, json.dumps([asdict(each) for each in made], default=_plain).encode())
    return made


def _read(data: bytes | None) -> list[Listed] | None:
    """Answers, or None where they are not kept or not whole."""
    try:
        return None if data is None else [Listed(**each) for each in json.loads(data)]
    except (ValueError, TypeError):
        return None


def _code() -> str:
    """What answers questions, as a hash."""
    about = hashlib.sha256(" ".join(version(name) for name in LIBRARIES).encode())
    for folder in CODE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            about.update(file.read_bytes())
    return about.hexdigest()


def _plain(value: Any) -> Any:
    """A number or an array of numpy's as JSON has it."""
    return value.tolist()
