"""The command `expert-atlas`: `expert-atlas capture ...` is `python jobs/capture.py ...`.

Every script in `jobs/` is a sub-command, described by the first line of its docstring; there is no other list.
"""

import difflib
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from jobs.console.interrupts import end_on_interrupt
from jobs.console.starting import Typed, give_help
from jobs.console.versions import versions

JOBS = Path(__file__).resolve().parents[1]
FIRST = ("demo", "capture", "status", "report", "explore", "query")
"""The most used commands, in the order of use; the others follow by name."""
PAGE = """Which experts does a mixture-of-experts language model choose, for every token of a data set?

usage: expert-atlas COMMAND [options]

Most used:
{first}

Also:
{others}

expert-atlas COMMAND --help shows the options of a command; expert-atlas --version prints versions.
expert-atlas COMMAND is the same as python jobs/COMMAND.py, which is the form for ray job submit.
"""


def main() -> NoReturn:
    """Run the script named on the command line, with the remaining arguments."""
    end_on_interrupt()
    arguments = sys.argv[1:]
    name = arguments[0].replace("-", "_") if arguments else "__help"
    if name == "__version":
        print(versions())
        sys.exit(0)
    if name in ("_h", "__help", "help"):
        give_help(page(), ["--help"])
    if name not in (known := commands()):
        _refuse(arguments[0], list(known))
    Typed.form = r"expert-atlas \1"
    sys.argv = sys.argv[1:]
    runpy.run_path(str(JOBS / f"{name}.py"), run_name="__main__")
    raise AssertionError("a script exits")


def commands() -> dict[str, str]:
    """Each sub-command, with a one-line description."""
    scripts = {path.stem: path for path in sorted(JOBS.glob("*.py")) if path.stem != "__init__"}
    names = [*FIRST, *(name for name in scripts if name not in FIRST)]
    return {name: scripts[name].read_text(encoding="utf-8").split('"""')[1].partition("\n")[0] for name in names}


def page() -> str:
    """The help page, with all sub-commands."""
    told, width = commands(), max(map(len, commands()))
    lines = {name: f"  {name:<{width}}  {about}" for name, about in told.items()}
    others = [line for name, line in lines.items() if name not in FIRST]
    return PAGE.format(first="\n".join(lines[name] for name in FIRST), others="\n".join(others))


def _refuse(word: str, known: list[str]) -> NoReturn:
    near = difflib.get_close_matches(word.replace("-", "_"), known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    print(f"error: unknown command {word!r}: {meant}expert-atlas --help lists them", file=sys.stderr)
    sys.exit(2)
