"""What `jobs/compare.py` reports about two data sets: which experts they use differently, and which tokens contribute.

Promises: the table and the JSON output have the same rows. Does not know about the command line.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs.console.tables import Column, Facts, count, number, print_line, print_table
from jobs.console.terminal import reporting

if TYPE_CHECKING:
    import xarray as xr

    from analysis.scanning import Selection

TOKENS_TOLD = 3  # per expert, in the table (arbitrary)
OF_LAYER = ("divergence", "divergence_low", "divergence_high", "divergence_by_chance", "p")
SAID = ("n", "documents", "effective_documents", "untested", "level", "estimator", "definition", "source")
LAYERS = (
    count("layer", "layer"),
    number("divergence in bits", "divergence", ".4f"),
    number("expected by chance", "divergence_by_chance", ".4f"),
    number("p", "p", ".4f"),
)
SHARES = (
    count("layer", "layer"),
    count("expert", "expert"),
    number("first", "share", ".4f", spare=1),
    number("second", "other_share", ".4f", spare=1),
    number("difference", "difference", "+.4f"),
    number("from", "low", "+.4f"),
    number("to", "high", "+.4f"),
    number("p", "p", ".4f"),
)
EXPERTS = (
    *SHARES,
    Column(name="main tokens", text=lambda row: _carriers(row["tokens"]), left=True, elastic=True),
)


def contrast_told(captures: "Mapping[str, xr.Dataset]", only: "Selection", top: int) -> Facts:
    """How two captures of one model differ: layer by layer, and the experts that differ most, with their tokens.

    Raises
    ------
    ValueError
        When they are not of one model and tokenizer, or one has no counted token.
    """
    from analysis.metrics.contrast import contrast  # numba takes a second: --help must not wait for it
    from analysis.metrics.differing import beyond_chance, expert_row, largest_cells
    from analysis.metrics.token_contributions import token_contributions

    with reporting("contrast", unit="shards", transient=True) as report:
        found = contrast(captures, only=only, progress=lambda done, total: report.add(1))
    cells = largest_cells(found["difference"].isel(data_set=0).values, top)
    layers = found["layer"].values
    first, second = captures.values()
    asked = sorted({int(layers[at]) for at, _ in cells})
    with reporting("tokens", unit="shards", transient=True) as report:
        progress = lambda done, total: report.add(1)
        carried = token_contributions(first, second, asked, top=top, only=only, progress=progress)
    return {
        "layers": [
            {"layer": int(layer), **{name: float(found[name][at]) for name in OF_LAYER}}
            for at, layer in enumerate(layers)
        ],
        "experts": [expert_row(found, carried, int(layers[at]), expert) for at, expert in cells],
        "cells": found["difference"].isel(data_set=0).size,
        "beyond_chance": beyond_chance(found),
        **{name: found.attrs[name] for name in SAID},
    }


def _carriers(tokens: list[dict[str, Any]]) -> str:
    """The first tokens, each with its part of the difference."""
    return ", ".join(f"{token['piece']} {token['contribution']:+.4f}" for token in tokens[:TOKENS_TOLD])


def print_contrast(console: Console, told: Facts) -> None:
    """Print the tables of layers and of experts, and their basis."""
    print_table(console, LAYERS, told["layers"])
    print_table(console, EXPERTS, told["experts"])
    tokens = " and ".join(f"{n:,} tokens of {told['documents'][name]:,} documents" for name, n in told["n"].items())
    print_line(console, f"{tokens}; difference: the first data set's share of tokens minus the second's")
    for name, reason in told["untested"].items():
        print_line(console, f"no intervals and no p-values: {name}: {reason}")
    if not told["untested"]:
        beyond = f"{told['beyond_chance']:,} of {told['cells']:,} experts differ by more than chance"
        print_line(console, f"{beyond}; {told['level']:.0%} intervals and p-values are simultaneous for all of them")
