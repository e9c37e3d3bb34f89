"""How a result is shown: a table with bars in a terminal, aligned columns in a pipe, one JSON document for scripts.

Promises: a terminal gets no line of a table that is wider than it is, and names the columns that this costs; a pipe, a
file, TERM=dumb and a terminal that knows no Unicode get every column, whole, one line a row, and no escape code; what a
text holds commands no terminal. Does not know what is shown.
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
BAR_CELLS, NARROW_BAR_CELLS, NARROW = 12, 8, 60  # of a bar, and in a terminal of fewer cells than the last (arbitrary)
ELASTIC_CELLS = 12  # that are left to an elastic column before others are left out (arbitrary)

Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of texts, each made from a row."""

    name: str
    text: Callable[[Facts], str]
    left: bool = False
    """To the left, as words; numbers stand to the right."""
    elastic: bool = False
    """Cut with "…" where a terminal is narrow; one column of a table may be."""
    spare: int = 0
    """A terminal that is too narrow leaves out the column with the highest number first, and never one with 0."""
    style: Callable[[Facts], str] = lambda row: ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A column of bars, which only a terminal gets."""

    part: Callable[[Facts], float | None]
    """Of a full bar, 0 to 1; None draws nothing."""
    spare: int = 1
    style: Callable[[Facts], str] = lambda row: "cyan"


def number(name: str, key: str, form: str = ".3f", spare: int = 0) -> Column:
    """A column of numbers, in Python's notation of a format; empty where there is none."""
    text = lambda row: "" if row[key] is None or math.isnan(row[key]) else format(row[key], form)
    return Column(name=name, text=text, spare=spare)


def count(name: str, key: str, spare: int = 0) -> Column:
    """A column of whole numbers."""
    return number(name, key, ",", spare)


class _Stdout(Console):
    """A console whose reader may go away, as `head` does: that ends the command as any other."""

    def on_broken_pipe(self) -> None:
        """Not rich's own exit, with status 1."""
        raise BrokenPipeError


def stdout_console() -> Console:
    """Standard output, on which nothing is coloured or replaced that the caller did not ask for.

    It is a terminal also where FORCE_COLOR says so.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # tokens are in every script, and this locale may not be
    return _Stdout(highlight=False, markup=False, emoji=False)


def is_drawn(console: Console) -> bool:
    """Whether tables and bars can be drawn there."""
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")


def print_line(console: Console, line: str, style: str = "") -> None:
    """One line; a terminal gets it broken between words."""
    console.print(Text(shown(line), style=style), soft_wrap=not is_drawn(console))


def print_table(
    console: Console, columns: Sequence[Column | Bars], rows: Sequence[Facts], *, section: str = "", note: str = ""
) -> None:
    """Rows under the names of their columns.

    Parameters
    ----------
    section
        A key of the rows: in a terminal an empty line stands where its value changes.
    note
        Said below what is drawn: what a full bar is.
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
    """One JSON document on a line, in ASCII; a number that is not finite is null."""
    print(json.dumps(_finite(document), allow_nan=False))


def _finite(value: Any) -> Any:
    """What JSON can say of it."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _align(console: Console, columns: Sequence[Column], rows: Sequence[Facts]) -> None:
    """The names, and a line a row; columns are two spaces apart."""
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
    """The columns that a terminal has room for; None where it has none even for those that are never left out."""
    kept = list(columns)
    while _least(kept, rows, width) > width:
        most = max(column.spare for column in kept)
        if not most:
            return None
        kept.remove(next(column for column in kept if column.spare == most))
    return kept


def _least(columns: Sequence[Column | Bars], rows: Sequence[Facts], width: int) -> int:
    """Cells that a line takes at least."""
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
