"""The output of jobs for people: one line per error, a progress bar in a terminal, plain lines in a log."""

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from store.plan import Plan
from store.secrets import without_secrets

LOG_EVERY_S = 10.0
NO_HOME = "/nonexistent"  # Debian's convention for a user without a home
AFTER = "finished work is kept, and the same command resumes"


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. Ray's calls only handle a KeyboardInterrupt, and raise that instead."""

    came = False

    def __init__(self) -> None:
        super().__init__()
        Terminated.came = True


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was received."""

    came = False

    def __init__(self) -> None:
        super().__init__()
        Interrupted.came = True


def run_job(main: Callable[[list[str]], int], after: str = AFTER) -> NoReturn:
    """Run a script's main function with the command line, and exit with its status.

    A user's mistake gives one line and status 2; a failed capture, status 1; Ctrl-C 130 and SIGTERM 143, and `after`
    says what happens to the work.
    """

    Terminated.came = Interrupted.came = False
    catch_signals()
    _name_a_home()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may contain bytes that are not characters
    try:
        status = main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        status = _status(error, after)
    sys.exit(status)


def _status(error: BaseException, after: str) -> int:
    """The exit status for the error that ended a job, which is reported in one line."""
    if Terminated.came:
        return _fail(143, f"terminated: {after}")
    if Interrupted.came or isinstance(
        error, KeyboardInterrupt
    ):  # a module interrupted during its import raises its own error
        return _fail(130, f"interrupted: {after}")
    if isinstance(error, BrokenPipeError):
        return 141
    if isinstance(error, ValueError | OSError):
        return _fail(2, str(error) or repr(error))
    if isinstance(error, RuntimeError):
        return _fail(1, str(error) or repr(error))
    raise error


def _name_a_home() -> None:
    """Set HOME if a user has none, as for an arbitrary user id in a container: some libraries fail to import without
    it."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = NO_HOME


def catch_signals() -> None:
    """Make Ctrl-C and SIGTERM end the job cleanly."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise(Interrupted))
    catch_sigterm()


def catch_sigterm() -> None:
    """Make SIGTERM end the job cleanly; call it again after a library has installed its own handler."""
    signal.signal(signal.SIGTERM, _raise(Terminated))


def _raise(kind: type[KeyboardInterrupt]) -> Callable[..., None]:
    def handler(*_: object) -> None:
        raise kind

    return handler


def _fail(status: int, message: str) -> int:
    log(f"error: {message}")
    return status


def log(line: str) -> None:
    """Print a line to the error stream, separate from a command's result.

    Control characters and secrets in quotes from files, libraries or servers are removed.
    """
    print("\n".join(map(shown, without_secrets(line).split("\n"))), file=sys.stderr, flush=True)


def say_next(*commands: str) -> None:
    """Print the commands that are useful next, one per line, at the end of a command."""
    log("\n".join(f"{'next:' if not number else '     '} {command}" for number, command in enumerate(commands)))


def shown(text: str) -> str:
    """A text as one line, with control characters as Python escapes, because they could control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def planned(plan: Plan, published: int | None) -> str:
    """A plan in one line, with the published number of documents if there is one."""
    parts = [f"{plan.documents:,} documents"]
    if published is not None:
        parts[0] += f" ({published:,} published)"
    parts += [f"{plan.documents_empty:,} of them empty"] * bool(plan.documents_empty)
    parts += [f"{plan.documents_repaired:,} with invalid bytes replaced"] * bool(plan.documents_repaired)
    parts += [f"{plan.documents_skipped:,} skipped because they cannot be rendered"] * bool(plan.documents_skipped)
    return ", ".join([*parts, f"{plan.rows:,} rows, {plan.tokens:,} tokens"])


def duration(seconds: float) -> str:
    """A time such as "3 h 20 min", "5 min 2 s" or "7 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Reporter:
    """The progress of one stage, in tokens or another unit."""

    def __init__(self, label: str, total: int | None, done: int, unit: str, transient: bool) -> None:
        self.console = Console(stderr=True)
        self.label, self.total, self.start_done, self.unit = label, total, done, unit
        self.done, self.started, self.logged = done, time.monotonic(), time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self.bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=self.console,
            transient=transient,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(label, total=total, completed=done, rate="")

    def to(self, done: int, note: str = "") -> None:
        """Set the progress to `done`."""
        self.done = max(self.done, done)
        rate = self.rate()
        self.bar.update(self.task, completed=self.done, rate=f"{rate:,.0f} {self.unit}/s {note}")
        if self.bar.disable and time.monotonic() - self.logged >= LOG_EVERY_S:
            self.logged = time.monotonic()
            left = "" if self.total is None or not rate else f", {(self.total - self.done) / rate:,.0f} s left"
            of = "" if self.total is None else f" of {self.total:,}"
            so_far = f"{self.label}: {self.done:,}{of} {self.unit}, {rate:,.0f} {self.unit}/s{left} {note}"
            self.console.print(so_far.rstrip())

    def add(self, number: int) -> None:
        """Advance the progress by a number."""
        self.to(self.done + number)

    def rate(self) -> float:
        """Units per second in this run."""
        return (self.done - self.start_done) / max(1e-9, time.monotonic() - self.started)


@contextmanager
def reporting(
    label: str, total: int | None = None, done: int = 0, unit: str = "tokens", *, transient: bool = False
) -> Iterator[Reporter]:
    """Show the progress of a stage while the block runs; a transient bar disappears at the end."""
    reporter = Reporter(label, total, done, unit, transient)
    with reporter.bar:
        yield reporter
