"""The questions of `jobs/query.py`: where a token goes, which tokens an expert gets, a document's path.

Promises: the table and the JSON output have the same rows. Does not know about the command line.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from jobs.console.query_columns import columns_of
from jobs.console.tables import Facts, is_drawn, print_line, print_table
from jobs.console.terminal import shown

if TYPE_CHECKING:
    import xarray as xr

    from analysis.metrics.tokens import TokenOrder

PIECE_CELLS = 16  # of a terminal's line, for the piece next to a path; arbitrary


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A question's answer as rows."""

    title: str
    kind: str
    """Determines the columns: see `columns_of`."""
    facts: Facts
    """The question, and the attributes of the answer."""
    rows: Sequence[Facts]
    section: str = ""
    """See `print_table`."""
    note: str = ""
    """A note at the end of the terminal output."""

    def draw(self, console: Console) -> None:
        """Print the title, and the rows if there are any."""
        print_line(console, self.title)
        if self.rows:
            print_table(
                console,
                columns_of(self.kind, self.facts),
                self.rows,
                section=self.section,
                note="a full bar means a share of 1",
            )
        if self.note:
            print_line(console, self.note)

    def as_json(self) -> dict[str, Any]:
        """The same for JSON output."""
        return {**self.facts, "rows": self.rows}


@dataclass(frozen=True, kw_only=True)
class DocumentPath:
    """A document's path, at some layers, as an answer."""

    path: "xr.Dataset"
    data_set: str
    num_experts: int

    def draw(self, console: Console) -> None:
        """Tokens as rows, layers as columns, each number on its expert's colour; in several blocks of layers if the
        terminal is narrow."""
        path = self.path
        left_out = f", {path.attrs['tokens_missing']:,} not yet captured" if path.attrs["tokens_missing"] else ""
        about = f"document {path.attrs['document']}, {path.attrs['name']}, in {self.data_set}"
        print_line(console, f"{about}: {path.attrs['n']:,} tokens{left_out}; a token's experts, the first choice first")
        if path.sizes["position"]:
            self._draw_tokens(console)

    def _draw_tokens(self, console: Console) -> None:
        layers, positions = (self.path[name].values.tolist() for name in ("layer", "position"))
        chosen = self.path["expert"].transpose("position", "layer", "k").values
        colors = [expert_color(expert, self.num_experts) for expert in range(self.num_experts)]
        pieces = [shown(piece) for piece in self.path["piece"].values]
        digits, number = len(str(self.num_experts - 1)), max(5, len(str(positions[-1])))
        wide = max(map(cell_len, (*pieces, "piece")))
        wide = min(wide, PIECE_CELLS) if is_drawn(console) else wide
        cell = max(chosen.shape[2] * (digits + 1) - 1, *(len(str(layer)) for layer in layers))
        step = max(1, (console.width - number - wide - 1) // (cell + 1)) if is_drawn(console) else len(layers)
        for start in range(0, len(layers), step):
            turn = slice(start, start + step)
            head = "".join(f" {layer:>{cell}}" for layer in layers[turn])
            console.print(Text(f"{'layer':>{number}} {'piece':<{wide}}{head}", style="bold"), soft_wrap=True)
            for position, piece, routes in zip(positions, pieces, chosen[:, turn], strict=True):
                line = Text(f"{position:>{number}} {set_cell_size(piece, wide)}")
                for choices in routes.tolist():
                    line.append(" " * (cell + 2 - len(choices) * (digits + 1)))
                    for k, expert in enumerate(choices):
                        line.append("," * (k > 0)).append(f"{expert:>{digits}}", style=colors[expert])
                console.print(line, soft_wrap=True)

    def as_json(self) -> dict[str, Any]:
        """The same for JSON output, with weights if there are any: one row per token, `expert` and `weight` as
        [layer][k]."""
        names = {"position": "position", "token": "token_id", "piece": "piece", "role": "role", "phase": "phase"}
        names |= {"expert": "expert", "weight": "weight"}
        ordered = self.path.transpose("position", "layer", "k")
        columns = {key: ordered[name].values.tolist() for name, key in names.items() if name in ordered.variables}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {**self.path.attrs, "layers": self.path["layer"].values.tolist(), "rows": rows}


Answer = Listed | DocumentPath


def document_answer(
    capture: "xr.Dataset",
    document: int | str,
    layers: list[int],
    *,
    roles: Sequence[str] = (),
    phases: Sequence[str] = (),
) -> DocumentPath:
    """A document's path, by its id or its name, for the tokens with one of these roles and phases."""
    from analysis.metrics.paths import document_path

    path = document_path(capture, document, roles=roles, phases=phases).sel(layer=layers)
    return DocumentPath(
        path=path,
        data_set=capture.attrs["dataset"],
        num_experts=int(capture.attrs["num_experts"]),
    )


def token_answer(capture: "xr.Dataset", token: int, layers: list[int], counts: "xr.Dataset") -> Listed:
    """The experts of a token, layer by layer, the most frequent first; experts without any are left out."""
    from analysis.metrics.tokens import token_experts_of

    occurrences, piece = int(counts["tokens"][token]), str(capture["piece"][token].values)
    rows: list[Facts] = []
    for layer in layers if occurrences else layers[:1]:
        table = token_experts_of(counts, layer)
        if occurrences:
            found = table.sel(token_id=token)
            order = (-found["counts"]).argsort(kind="stable").values.tolist()
            rows += [{"layer": layer, **_numbers(found, expert)} for expert in order if found["counts"][expert]]
    title = f"{piece} (id {token}) in {capture.attrs['dataset']}: {occurrences:,} occurrences; {_chance(table)}"
    facts = {"token_id": token, "piece": piece, "tokens": occurrences, **table.attrs}
    return Listed(title=title, kind="experts", facts=facts, rows=rows, section="layer")


def _numbers(found: "xr.Dataset", expert: int) -> dict[str, Any]:
    own = found.isel(expert=expert)
    return {"expert": expert, "count": own["counts"].item(), **{name: own[name].item() for name in ("share", "lift")}}


def expert_answer(
    capture: "xr.Dataset",
    layer: int,
    expert: int,
    counts: "xr.Dataset",
    *,
    top: int = 20,
    by: "TokenOrder" = "count",
    min_count: int = 1,
) -> Listed:
    """The first tokens of an expert, by count or by lift."""
    from analysis.metrics.tokens import expert_tokens_of

    found = expert_tokens_of(counts, layer, top=top, by=by, min_count=min_count).sel(expert=expert)
    found = found.rename(counts="count", place="rank")
    values = {name: found[name].values.tolist() for name in ("rank", *found.data_vars)}
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    least = f"; tokens with fewer than {min_count} occurrences are left out" * (min_count > 1)
    about = f"expert {expert} of layer {layer} in {capture.attrs['dataset']}, by {by}"
    return Listed(
        title=f"{about}; {_chance(found)}{least}",
        kind="tokens",
        facts={"layer": layer, "expert": expert, **found.attrs},
        rows=[row for row in rows if row["token_id"] >= 0],
    )


def _chance(found: "xr.Dataset") -> str:
    return f"expected by chance: share {found.attrs['null']:.4f}, lift 1"


def expert_color(expert: int, experts: int) -> str:
    """Black on a light colour specific to the expert."""
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(expert / experts, 0.72, 0.75))
    return f"black on rgb({red},{green},{blue})"
