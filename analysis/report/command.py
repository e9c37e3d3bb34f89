"""The command that makes a capture again, from the capture's own metadata.

A group keeps the options that it was made with and, in its identity, the values that were resolved at run time: the
commit of a branch, or what fitted the device. The command names both, so it stays valid when a default or a branch
changes. It holds what was given on the command line or in a file; tokens and credentials come from the environment and
are never included.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HOW = ("workers", "cpus_per_worker", "stall_minutes", "retry_quarantined", "allow_mixed")
"""Options that do not change any byte and may differ on another machine."""
FOUND = {"dtype": "compute_dtype", "batch_tokens": "batch_tokens", "model_revision": "model_revision"}
"""Options, and the field of the identity that holds their resolved value."""
FOUND_OF_ONE = {"sequence_length": "sequence_length", "rows_per_shard": "rows_per_shard", "revision": "text_revision"}
"""The same, only for commands with a single data set: for others, the resolved values may differ."""
_COMMIT = re.compile("[0-9a-f]{40}")


def command(attrs: Mapping[str, Any]) -> str | None:
    """The command of a capture, quoted for a shell; None if the capture does not say how it was made.

    Parameters
    ----------
    attrs : mapping
        The attributes of the capture's group: `configuration` and `identity`.

    Notes
    -----
    A capture that was made together with others, by one command with several data sets, has that command, which makes
    all of them.
    """
    configuration, identity = attrs.get("configuration"), attrs.get("identity") or {}
    if not configuration:
        return None
    found = FOUND | (FOUND_OF_ONE if len(configuration.get("dataset", ())) == 1 else {})
    options = dict(configuration)
    for option, field in found.items():
        value = identity.get(field)
        # A branch is replaced by its commit; anything else is the fingerprint of a folder.
        if _COMMIT.fullmatch(str(value)) if option.endswith("revision") else options.get(option) is None:
            options[option] = value
    script = str(attrs.get("script", "jobs/capture.py"))  # older captures do not record it
    return shlex.join(["python", script, *_arguments(options)])


@dataclass(frozen=True, kw_only=True)
class Made:
    """How captures with the same code and environment were made."""

    versions: str
    commands: Sequence[tuple[Sequence[str], str]]
    """The names of captures, and the command that makes them."""


def made(captures: Mapping[str, Mapping[str, Any]]) -> list[Made]:
    """How captures were made, without those that do not say.

    Parameters
    ----------
    captures : mapping of str to mapping
        Attributes by name.
    """
    alike: dict[str, dict[str, list[str]]] = {}
    for name, attrs in captures.items():
        if told := command(attrs):
            alike.setdefault(versions(attrs), {}).setdefault(told, []).append(name)
    return [
        Made(versions=environment, commands=[(names, told) for told, names in by_command.items()])
        for environment, by_command in alike.items()
    ]


def versions(attrs: Mapping[str, Any]) -> str:
    """The code and the packages that a capture was made with, in words."""
    commit = str(attrs.get("git_commit") or "of unknown commit")
    changed = " with uncommitted changes" if commit.endswith("+") else ""
    packages = ", ".join(f"{name} {version}" for name, version in (attrs.get("environment") or {}).items())
    return f"code {commit.removesuffix('+')}{changed}; {packages}"


def _arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """Options in the order in which they are kept, without those that are None, off or empty, which are defaults."""
    for name, value in options.items():
        if name in HOW or value is None or value is False or value == []:
            continue
        if value is True:
            yield f"--{name}"
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            yield from [f"--{name}={each}"] if str(each).startswith("-") else [f"--{name}", str(each)]
