"""The first steps of a script: print its help, and let Ctrl-C end it, before slow imports.

The docstring of a script is its help page; `expert-atlas --help` shows the first line. Imports nothing slow.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.console.interrupts import end_on_interrupt

COMMAND = re.compile(r"(?<!-- )python jobs/(\w+)\.py")
"""A command of this project in a text. The command after -- of `ray job submit` and resubmit stays a script, because
nothing is installed in the folder in which it runs."""


class Typed:
    """The form in which the user starts scripts."""

    form = r"python jobs/\1.py"


def start(name: str, page: str | None) -> None:
    """Start a script; does nothing for an imported module.

    Parameters
    ----------
    name, page
        The module's `__name__` and `__doc__`.
    """
    if name == "__main__":
        end_on_interrupt()
        give_help(page, sys.argv[1:])


def give_help(page: str | None, arguments: Sequence[str]) -> None:
    """Print a help page and exit with status 0, if requested on the command line."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if not {"-h", "--help"}.isdisjoint(own):
        assert page
        print(_with_bold_headings(as_typed(page.rstrip())))
        sys.exit(0)


def as_typed(text: str) -> str:
    """A text with this project's commands in the form that the user types: with `expert-atlas`, or as scripts."""
    return COMMAND.sub(Typed.form, text)


def command_line(script: str, *arguments: object) -> str:
    """A command of this project for copying to a shell, with this folder's Python if that is the running one.

    Parameters
    ----------
    script
        The script's name: "report".
    arguments
        Its arguments; paths inside the folder are shortened.
    """
    words = [f"python jobs/{script}.py", *(shlex.quote(_from_here(str(argument))) for argument in arguments)]
    typed, python = as_typed(" ".join(words)), _from_here(sys.executable)
    return python + typed.removeprefix("python") if python != sys.executable and typed.startswith("python") else typed


def _from_here(path: str) -> str:
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _with_bold_headings(page: str) -> str:
    """A page for a terminal; lines at the margin that end in a colon are headings."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return page
    return re.sub(r"^(\S.*:)$", "\x1b[1m\\1\x1b[0m", page, flags=re.MULTILINE)
