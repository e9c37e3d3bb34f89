"""The command that makes a capture again, from what the capture says of itself.

A group keeps the options that it was made with and, in its identity, what the options left to be found: the commit that
a branch stood for, what fitted the device. The command names both, so that it means the same when a default or a branch
has moved. It holds what was given on a command line or in a file; tokens and credentials come from the environment and
are never among it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HOW = ("workers", "cpus_per_worker", "stall_minutes", "retry_quarantined", "allow_mixed")
"""Options that change no byte, and that another machine needs otherwise."""
FOUND = {"dtype": "compute_dtype", "batch_tokens": "batch_tokens", "model_revision": "model_revision"}
"""Options, and the field of the identity that says what they came to."""
FOUND_OF_ONE = {"sequence_length": "sequence_length", "rows_per_shard": "rows_per_shard", "revision": "text_revision"}
"""The same where the command names a single data set: others may have come to something else."""
_COMMIT = re.compile("[0-9a-f]{40}")


def command(attrs: Mapping[str, Any]) -> str | None:
    """The command of a capture, quoted for a shell; None where the capture does not say how it was made.

    Parameters
    ----------
    attrs : mapping
        The attributes of the capture's group: `configuration` and `identity`.

    Notes
    -----
    A capture that was made together with others, by one command with several data sets, has that command: it makes all
    of them.
    """
    configuration, identity = attrs.get("configuration"), attrs.get("identity") or {}
    if not configuration:
        return None
    found = FOUND | (FOUND_OF_ONE if len(configuration.get("dataset", ())) == 1 else {})
    options = dict(configuration)
    for option, field in found.items():
        value = identity.get(field)
        # In place of a branch the commit that it stood for; what is no commit is the fingerprint of a folder.
        if _COMMIT.fullmatch(str(value)) if option.endswith("revision") else options.get(option) is None:
            options[option] = value
    script = str(attrs.get("script", "jobs/capture.py"))  # of older captures, which do not say
    return shlex.join(["python", script, *_arguments(options)])


@dataclass(frozen=True, kw_only=True)
class Made:
    """How captures of one code and one environment were made."""

    versions: str
    commands: Sequence[tuple[Sequence[str], str]]
    """The names of captures, and the command that makes them."""


def made(captures: Mapping[str, Mapping[str, Any]]) -> list[Made]:
    """How captures were made; nothing of those that do not say.

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
    commit = str(attrs.get("git_commit") or "of no known commit")
    changed = " with changes that were not committed" if commit.endswith("+") else ""
    packages = ", ".join(f"{name} {version}" for name, version in (attrs.get("environment") or {}).items())
    return f"code {commit.removesuffix('+')}{changed}; {packages}"


def _arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """Options in the order in which they are kept; what is None, off or empty is as it is without being named."""
    for name, value in options.items():
        if name in HOW or value is None or value is False or value == []:
            continue
        if value is True:
            yield f"--{name}"
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            yield from [f"--{name}={each}"] if str(each).startswith("-") else [f"--{name}", str(each)]
