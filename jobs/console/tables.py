"""How a result is shown: a table with bars in a terminal, aligned columns in a pipe, one JSON document for scripts.

Promises: no line of a table is wider than the terminal, and left-out columns are listed; a pipe, a file, TERM=dumb and
a terminal without Unicode get every column in full, one line per row, without escape codes; control characters in texts
are escaped. Does not know what is shown.
"""

import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.bar import Bar
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.console.terminal import shown

GAP = 2  # cells between two columns
BAR_CELLS, NARROW_BAR_CELLS, NARROW = 12, 8, 60  # cells of a bar, also in a narrower terminal (arbitrary)
ELASTIC_CELLS = 12  # least cells of an elastic column before others are left out (arbitrary)

Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of texts, each made from a row."""

    name: str
    text: Callable[[Facts], str]
    left: bool = False
    """Left-aligned, for words; numbers are right-aligned."""
    elastic: bool = False
    """Truncated with "…" in a narrow terminal; at most one column of a table."""
    spare: int = 0
    """In a narrow terminal, the column with the highest number is left out first, and one with 0 never."""
    style: Callable[[Facts], str] = lambda row: ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A column of bars, only shown in a terminal."""

    part: Callable[[Facts], float | None]
    """The length as a fraction of a full bar, 0 to 1; None draws nothing."""
    spare: int = 1
    style: Callable[[Facts], str] = lambda row: "cyan"


def number(name: str, key: str, form: str = ".3f", spare: int = 0) -> Column:
    """A column of numbers, in Python's format notation; empty if there is no number."""
    text = lambda row: "" if row[key] is None or math.isnan(row[key]) else format(row[key], form)
    return Column(name=name, text=text, spare=spare)


def count(name: str, key: str, spare: int = 0) -> Column:
    """A column of integers."""
    return number(name, key, ",", spare)


class _Stdout(Console):
    """A console whose reader may exit, like `head`: the command then ends like any other."""

    def on_broken_pipe(self) -> None:
        """Override rich's exit with status 1."""
        raise BrokenPipeError


def stdout_console() -> Console:
    """Standard output, without colours or replacements that the caller did not request.

    It also counts as a terminal if FORCE_COLOR is set.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # tokens may be in scripts outside the locale
    return _Stdout(highlight=False, markup=False, emoji=False)


def is_drawn(console: Console) -> bool:
    """Whether tables and bars can be drawn on it."""
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")


def print_line(console: Console, line: str, style: str = "") -> None:
    """Print one line; wrapped between words in a terminal."""
    console.print(Text(shown(line), style=style), soft_wrap=not is_drawn(console))


def print_table(
    console: Console, columns: Sequence[Column | Bars], rows: Sequence[Facts], *, section: str = "", note: str = ""
) -> None:
    """Print rows under the names of their columns.

    Parameters
    ----------
    section
        A key of the rows: a terminal shows an empty line where its value changes.
    note
        A note below the table, such as the meaning of a full bar.
    """
    texts = [column for column in columns if isinstance(column, Column)]
    kept = _fitting(columns, rows, console.width) if is_drawn(console) else None
    if kept is None:
        _align(console, texts, rows)
        return
    console.print(_drawn(kept, rows, console.width, section))
    if any(isinstance(column, Bars) for column in kept) and note:
        print_line(console, note, style="dim")
    if left_out := [column.name for column in texts if column not in kept]:
        print_line(console, f"{console.width} cells are too few for: {', '.join(left_out)}", style="dim")


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on a line, in ASCII; a number that is not finite is null."""
    print(json.dumps(_finite(document), allow_nan=False))


def _finite(value: Any) -> Any:
    """The value with non-finite numbers as None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _align(console: Console, columns: Sequence[Column], rows: Sequence[Facts]) -> None:
    """Print the names and one line per row; columns are two spaces apart."""
    widths = [_cells(column, rows) for column in columns]
    for texts in ([column.name for column in columns], *([shown(c.text(row)) for c in columns] for row in rows)):
        padding = [" " * (width - cell_len(text)) for text, width in zip(texts, widths, strict=True)]
        parts = [
            text + pad if column.left else pad + text for column, text, pad in zip(columns, texts, padding, strict=True)
        ]
        print_line(console, (" " * GAP).join(parts).rstrip())


def _cells(column: Column, rows: Sequence[Facts]) -> int:
    return max(map(cell_len, (column.name, *(shown(column.text(row)) for row in rows))))


def _fitting(columns: Sequence[Column | Bars], rows: Sequence[Facts], width: int) -> list[Column | Bars] | None:
    """The columns that fit into a terminal; None if not even those fit that are never left out."""
    kept = list(columns)
    while _least(kept, rows, width) > width:
        most = max(column.spare for column in kept)
        if not most:
            return None
        kept.remove(next(column for column in kept if column.spare == most))
    return kept


def _least(columns: Sequence[Column | Bars], rows: Sequence[Facts], width: int) -> int:
    """The least width of a line in cells."""
    cells = [_bar_cells(width) if isinstance(column, Bars) else _cells(column, rows) for column in columns]
    elastic = [isinstance(column, Column) and column.elastic for column in columns]
    least = [min(size, ELASTIC_CELLS) if may else size for size, may in zip(cells, elastic, strict=True)]
    return sum(least) + GAP * (len(least) - 1)


def _bar_cells(width: int) -> int:
    return NARROW_BAR_CELLS if width < NARROW else BAR_CELLS


def _drawn(columns: Sequence[Column | Bars], rows: Sequence[Facts], width: int, section: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    rigid = [column for column in columns if not (isinstance(column, Column) and column.elastic)]
    room = width - _least(rigid, rows, width) - GAP
    for column in columns:
        if isinstance(column, Bars):
            table.add_column(width=_bar_cells(width))
        else:
            most = room if column.elastic else None
            justify: Any = "left" if column.left else "right"
            table.add_column(Text(column.name), justify=justify, no_wrap=True, overflow="ellipsis", max_width=most)
    for number, row in enumerate(rows):
        if section and number and row[section] != rows[number - 1][section]:
            table.add_section()
        table.add_row(*(_cell(column, row, _bar_cells(width)) for column in columns))
    return table


def _cell(column: Column | Bars, row: Facts, cells: int) -> Text | Bar:
    if isinstance(column, Column):
        return Text(shown(column.text(row)), style=column.style(row))
    part = column.part(row)
    if part is None or math.isnan(part):
        return Text("")
    return Bar(1.0, 0.0, part, width=cells, color=column.style(row))
