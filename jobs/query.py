"""One question to a store, or its tables as Parquet: `python jobs/query.py STORE --token "▁the" --layer 15`."""

import colorsys
import difflib
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.places import captures_at
from jobs.terminal import reporting, run_job, say

if TYPE_CHECKING:
    import xarray as xr

    from analysis.tokens import Order, TopTokens

ORDERS: "tuple[Order, ...]" = ("count", "lift")
PIECE_CELLS = 16  # of a terminal's line, for the piece beside a path; arbitrary


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Ask where a token goes, which tokens an expert gets, or what way a document's tokens take.

    Special tokens, such as <s>, are never counted. An incomplete capture is asked as far as it goes, and a line says
    so. What is counted is kept beside the store: the first question reads all of it, later ones do not. Exit status: 0
    answered, 2 when that cannot be.
    """

    store: Annotated[str, tyro.conf.Positional]
    """STORE, or STORE/DATASET where it holds several: demo.zarr/demo-prose, s3://bucket/routes.zarr/wikitext-103."""
    token: str | None = None
    """A token, as the tokenizer's piece: "▁the", "<0x0A>". Where it goes: its experts by layer. Write --token=-x where
    it begins with a dash."""
    token_id: int | None = None
    """The same, by its id."""
    expert: str | None = None
    """An expert, as LAYER:EXPERT: 15:3. Its tokens, by count and by lift."""
    document: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A document, by its id, or by its name where that is no number. Its path: each token's experts, layer by layer,
    the first choice first. May be repeated."""
    parquet: str | None = None
    """A folder: write load, token_experts, transitions and the routes of each --document there, as Parquet, of all
    data sets of STORE. analysis/examples/queries.sql asks them with DuckDB."""
    layer: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """With --token and --document: only this layer, by the model's own number. May be repeated. Default: all."""
    top: int = 20
    """With --expert: tokens listed."""
    min_count: int = 1
    """With --expert: leave out tokens that occur less often; the lift of a rare token is mostly luck."""


def main(arguments: list[str]) -> int:
    """Answer."""
    config = tyro.cli(QueryConfig, prog="python jobs/query.py", args=arguments, use_underscores=True)
    question = _question(config)
    store, names = captures_at(config.store)
    if not names:
        raise ValueError(f"{store} holds no data set yet")
    documents = [int(document) if document.isdecimal() else document for document in config.document]

    from analysis.tables import write_tables  # numba takes a second: --help does not wait for it

    if config.parquet is not None:
        with reporting("tables", unit="shards") as report:
            told = lambda name, done, total: report.add(1)
            states = write_tables(store, config.parquet, datasets=names, documents=documents, progress=told)
        for state in states:
            if not state.complete:
                say(f"note: {state}")
        print(Path(config.parquet).absolute())
        return 0
    if len(names) > 1:
        raise ValueError(f"{store} holds {', '.join(names)}: say which, as {store.rstrip('/')}/{names[0]}")

    from analysis.results import measure
    from analysis.tokens import TokenCounts, TopTokens
    from store import coverage
    from store.reader import open_covered

    state = coverage(store, names[0])
    capture = open_covered(store, state)
    layers = _layers(capture, config.layer)
    if not state.complete:
        say(f"note: {state}")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if question == "document":
        for document in documents:
            draw_document(console, capture, document, layers)
        return 0
    if question == "expert":
        layer, expert = _expert(capture, config.expert or "")
        rankings = [TopTokens([layer], top=config.top, by=by, min_count=config.min_count) for by in ORDERS]
    else:
        token = _token(capture, config.token, config.token_id)
    with reporting(names[0], unit="shards") as report:
        ask = partial(measure, state=state, progress=lambda done, total: report.to(done))
        counts = ask(store, names[0], [TokenCounts()])[0]
    if question == "expert":
        print_expert(console, counts, capture, expert, rankings)
    else:
        print_token(console, counts, capture, token, layers)
    return 0


def shown(text: str) -> str:
    """A piece or a title as one line without control characters, which could command a terminal: as Python escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_token(console: Console, counts: "xr.Dataset", capture: "xr.Dataset", token: int, layers: list[int]) -> None:
    """The experts of a token, layer by layer, the most frequent first."""
    from analysis.tables import at_layer
    from analysis.tokens import TokenExperts

    occurrences, piece = int(counts["tokens"][token]), shown(str(capture["piece"][token].values))
    chance = capture.sizes["k"] / int(capture.attrs["num_experts"])
    about = f"{piece} (id {token}) in {capture.attrs['dataset']}: {occurrences:,} occurrences"
    _print(console, f"{about}; by chance a share is {chance:.4f}, a lift 1")
    if not occurrences:
        return
    table = _table(("layer", "expert", "count", "share", "lift"))
    for layer in layers:
        found = TokenExperts().finish(at_layer(counts, layer), capture).isel(layer=0).sel(token_id=token)
        for index in (-found["count"]).argsort(kind="stable").values.tolist():
            row = found.isel(expert=index)
            if count := int(row["count"]):
                values = (
                    f"{layer}",
                    f"{index}",
                    f"{count:,}",
                    f"{float(row['share']):.4f}",
                    f"{float(row['lift']):.2f}",
                )
                table.add_row(*values)
        table.add_section()
    console.print(table)


def print_expert(
    console: Console, counts: "xr.Dataset", capture: "xr.Dataset", expert: int, rankings: "list[TopTokens]"
) -> None:
    """The first tokens of an expert, in each order of rankings of one layer."""
    from analysis.tables import at_layer

    for ranking in rankings:
        [layer] = ranking.layers or ()
        found = ranking.finish(at_layer(counts, layer), capture).isel(layer=0).sel(expert=expert)
        least = f"; tokens that occur less than {ranking.min_count} times are left out" * (ranking.min_count > 1)
        about = f"expert {expert} of layer {layer} in {capture.attrs['dataset']}, by {ranking.by}"
        _print(console, f"{about}; by chance a lift is 1{least}")
        table = _table(("", "token", "id", "count", "of", "share", "lift"), left=1)
        for index in range(found.sizes["rank"]):
            row = {name: found[name].values[index] for name in found.data_vars}
            if row["token_id"] >= 0:
                values = (f"{row['token_id']}", f"{row['count']:,}", f"{row['tokens']:,}", f"{row['share']:.4f}")
                table.add_row(f"{index + 1}", Text(shown(row["piece"])), *values, f"{row['lift']:.2f}")
        console.print(table)


def draw_document(console: Console, capture: "xr.Dataset", document: int | str, layers: list[int]) -> None:
    """Tokens as rows, layers as columns, each number on its expert's colour; a narrow terminal gets layers in turns."""
    from analysis.paths import document_path

    path = document_path(capture, document).sel(layer=layers)
    missing, experts = path.attrs["tokens_missing"], int(capture.attrs["num_experts"])
    about = f"document {path.attrs['document']}, {shown(path.attrs['name'])}, in {capture.attrs['dataset']}"
    left_out = f", {missing:,} not captured yet" if missing else ""
    _print(console, f"{about}: {path.attrs['n']:,} tokens{left_out}; a token's experts, the first choice first")
    if not path.sizes["position"]:
        return
    colors = [_color(expert, experts) for expert in range(experts)]
    pieces = [shown(piece) for piece in path["piece"].values]
    positions, chosen = path["position"].values.tolist(), path["expert"].transpose("position", "layer", "k").values
    digits, number = len(str(experts - 1)), max(5, len(str(positions[-1])))
    wide = max(map(cell_len, (*pieces, "piece")))
    wide = min(wide, PIECE_CELLS) if console.is_terminal else wide
    cell = max(chosen.shape[2] * (digits + 1) - 1, *(len(str(layer)) for layer in layers))
    step = max(1, (console.width - number - wide - 1) // (cell + 1)) if console.is_terminal else len(layers)
    for start in range(0, len(layers), step):
        turn = slice(start, start + step)
        head = "".join(f" {layer:>{cell}}" for layer in layers[turn])
        _print(console, f"{'layer':>{number}} {'piece':<{wide}}{head}", style="bold")
        for position, piece, routes in zip(positions, pieces, chosen[:, turn], strict=True):
            line = Text(f"{position:>{number}} {set_cell_size(piece, wide)}")
            for choices in routes.tolist():
                line.append(" " * (cell + 2 - len(choices) * (digits + 1)))
                for k, expert in enumerate(choices):
                    line.append("," * (k > 0)).append(f"{expert:>{digits}}", style=colors[expert])
            _print(console, line)


def _question(config: QueryConfig) -> str:
    """What is asked, by its option's name."""
    given = {
        "token": config.token is not None,
        "token_id": config.token_id is not None,
        "expert": config.expert is not None,
        "document": bool(config.document) and config.parquet is None,
        "parquet": config.parquet is not None,
    }
    asked = [name for name, is_given in given.items() if is_given]
    if len(asked) != 1:
        got = " and ".join(f"--{name}" for name in asked) or "none"
        raise ValueError(f"ask one of --token, --token_id, --expert, --document or --parquet; got {got}")
    limits = {"layer": ("token", "token_id", "document"), "top": ("expert",), "min_count": ("expert",)}
    for option, questions in limits.items():
        if getattr(config, option) != getattr(QueryConfig, option) and asked[0] not in questions:
            goes_with = ", ".join(f"--{name}" for name in questions)
            raise ValueError(f"--{option} goes with {goes_with}, not with --{asked[0]}")
    if config.parquet is not None and "://" in config.parquet:
        raise ValueError(f"--parquet {config.parquet}: give a folder of this machine")
    return asked[0]


def _layers(capture: "xr.Dataset", wanted: tuple[int, ...]) -> list[int]:
    """Those that were asked for, or all."""
    captured: list[int] = capture["layer"].values.tolist()
    if unknown := sorted(set(wanted) - set(captured)):
        raise ValueError(f"layers {unknown} were not captured; {capture.attrs['dataset']} has {captured}")
    return list(wanted) or captured


def _expert(capture: "xr.Dataset", place: str) -> tuple[int, int]:
    """The layer and the expert of LAYER:EXPERT."""
    parts = re.fullmatch(r"(\d+):(\d+)", place, re.ASCII)
    if parts is None:
        raise ValueError(f"--expert {place!r} is no LAYER:EXPERT, such as 15:3")
    layer, expert = _layers(capture, (int(parts[1]),))[0], int(parts[2])
    if expert >= (experts := int(capture.attrs["num_experts"])):
        raise ValueError(f"--expert {place}: a layer has experts 0 to {experts - 1}")
    return layer, expert


def _token(capture: "xr.Dataset", piece: str | None, token_id: int | None) -> int:
    """A token's id, from either; special tokens, which are not counted, are refused."""
    pieces: list[str] = capture["piece"].values.tolist()
    if token_id is None:
        found = [number for number, other in enumerate(pieces) if other == piece]
        if len(found) != 1:
            raise ValueError(_which(piece or "", pieces, found))
        token_id = found[0]
    if not 0 <= token_id < len(pieces):
        raise ValueError(f"--token_id {token_id}: the vocabulary has tokens 0 to {len(pieces) - 1}")
    if token_id in capture.attrs["special_token_ids"]:
        raise ValueError(f"token {token_id}, {shown(pieces[token_id])}, is a special one: they are not counted")
    return token_id


def _which(piece: str, pieces: list[str], found: list[int]) -> str:
    """What to say when several tokens have a piece, or none, and which ones are near it."""
    if found:
        return f"tokens {found} all have the piece {shown(piece)}: give one as --token_id"
    plain: dict[str, list[int]] = {}  # ▁ of SentencePiece and Ġ of byte-level BPE stand for a space
    for number, other in enumerate(pieces):
        plain.setdefault(_plain(other), []).append(number)
    near = [_plain(piece), *difflib.get_close_matches(_plain(piece), plain, n=5)]
    numbers = [number for word in dict.fromkeys(near) for number in plain.get(word, [])][:5]
    named = ", ".join(f"{shown(pieces[number])} ({number})" for number in numbers)
    return f"no token has the piece {shown(piece)}; near it, with their ids: {named or 'none'}"


def _plain(piece: str) -> str:
    return piece.replace("▁", " ").replace("Ġ", " ").strip().casefold()


def _color(expert: int, experts: int) -> str:
    """Black on a light colour of an expert's own."""
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(expert / experts, 0.72, 0.75))
    return f"black on rgb({red},{green},{blue})"


def _table(columns: tuple[str, ...], left: int | None = None) -> Table:
    """Columns to the right, but one."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == left else "right", overflow="fold")
    return table


def _print(console: Console, line: str | Text, **style: Any) -> None:
    """One line, however long."""
    console.print(line, soft_wrap=True, markup=False, **style)


if __name__ == "__main__":
    run_job(main)
