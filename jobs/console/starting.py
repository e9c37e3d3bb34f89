"""What a script does first: it gives its help, and lets Ctrl-C end it, before it imports what takes time.

The docstring of a script is its help page; the first line is what `expert-atlas --help` says of the script. Imports
nothing of ours that is slow.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.console.interrupts import end_on_interrupt

COMMAND = re.compile(r"(?<!-- )python jobs/(\w+)\.py")
"""A command of ours in a text. What `ray job submit` and resubmit get behind -- stays a script: nothing is installed in
the folder in which they run it."""


class Typed:
    """How the user starts scripts."""

    form = r"python jobs/\1.py"


def start(name: str, page: str | None) -> None:
    """Begin a script: a module that is imported begins nothing.

    Parameters
    ----------
    name, page
        The module's `__name__` and `__doc__`.
    """
    if name == "__main__":
        end_on_interrupt()
        give_help(page, sys.argv[1:])


def give_help(page: str | None, arguments: Sequence[str]) -> None:
    """Print a help page and exit with status 0, where a command line asks for it."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if not {"-h", "--help"}.isdisjoint(own):
        assert page
        print(_with_bold_headings(as_typed(page.rstrip())))
        sys.exit(0)


def as_typed(text: str) -> str:
    """A text in which commands of ours stand as the user types them: with `expert-atlas`, or as scripts."""
    return COMMAND.sub(Typed.form, text)


def command_line(script: str, *arguments: object) -> str:
    """A command of ours that can be copied to a shell, with the Python of this folder where that is the one that runs.

    Parameters
    ----------
    script
        Its name: "report".
    arguments
        Paths within the folder are shortened.
    """
    words = [f"python jobs/{script}.py", *(shlex.quote(_from_here(str(argument))) for argument in arguments)]
    typed, python = as_typed(" ".join(words)), _from_here(sys.executable)
    return python + typed.removeprefix("python") if python != sys.executable and typed.startswith("python") else typed


def _from_here(path: str) -> str:
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _with_bold_headings(page: str) -> str:
    """A page for a terminal: lines at the margin that end in a colon are headings."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return page
    return re.sub(r"^(\S.*:)$", "\x1b[1m\\1\x1b[0m", page, flags=re.MULTILINE)
