"""What `jobs/compare.py` tells of two captures of the same tokens: how far they agree, and what predictions lose.

Promises: what is drawn and what a script gets are the same rows. Does not know how a question was put.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs.console.tables import Column, Facts, count, number, print_line, print_table
from jobs.console.terminal import reporting

if TYPE_CHECKING:
    import xarray as xr

    from analysis.scanning import Selection

MEASURES = ("same_set", "overlap", "same_first", "first_difference", "margin", "margin_at_flips")
COLUMNS = (
    Column(name="layer", text=lambda row: row["layer"]),
    *(number(name.replace("_", " "), name, ".4f", spare=at) for at, name in enumerate(MEASURES)),
)
OF_TOKENS = (
    Column(name="tokens that lose most", text=lambda row: row["piece"], left=True),
    count("predicted", "tokens"),
    number("effect", "effect", "+.4f"),
    Column(name="in all", text=lambda row: f"{row['effect'] * row['tokens']:+.3f}"),
)


def agreement_told(captures: "Sequence[xr.Dataset]", only: "Selection", top: int) -> Facts:
    """How far two captures agree, layer by layer, and the effect where both recorded log-probabilities.

    Raises
    ------
    OtherTokens
        When they do not hold the same tokens; see `analysis.metrics.agreement`.
    """
    from analysis.metrics.agreement import Agreement, paired  # numba takes a second: --help does not wait for it
    from analysis.scanning import scan

    with reporting("compare", unit="shards", transient=True) as report:
        found = scan(paired(*captures), [Agreement()], only=only, progress=lambda done, total: report.to(done))[0]
    rows: list[Facts] = [
        {"layer": str(layer), **{measure: float(found[measure].sel(layer=layer)) for measure in MEASURES}}
        for layer in found["layer"].values.tolist()
    ]
    rows.append({"layer": "by chance", **{measure: found[measure].attrs["null"] for measure in MEASURES}})
    return {
        "layers": rows,
        "n": found.attrs["n"],
        "any_difference": found.attrs["any_difference"],
        "effect": _effect(captures, only, top) if all("logprob" in capture for capture in captures) else None,
    }


def _effect(captures: "Sequence[xr.Dataset]", only: "Selection", top: int) -> Facts:
    """How the second capture predicts the tokens, beside the first, and which tokens lose most in all."""
    from analysis.metrics.effect import effect

    with reporting("effect", unit="shards", transient=True) as report:
        found = effect(*captures, only=only, progress=lambda done, total: report.to(done))
    values = {name: float(found[name]) for name in ("effect", "low", "high", "p")}
    said = {name: found.attrs[name] for name in ("level", "untested", "n", "documents", "estimator", "definition")}
    return {**values, **said, "lose_most": _losing_tokens(captures[0], found, top)}


def _losing_tokens(capture: "xr.Dataset", found: "xr.Dataset", top: int) -> list[dict[str, Any]]:
    """The tokens that lose most over all their occurrences."""
    mean, tokens = found["of_token"].fillna(0).values, found["tokens"].values
    worst = (mean * tokens).argsort(kind="stable")[:top].tolist()
    return [
        {
            "token_id": token,
            "piece": str(capture["piece"].values[token]),
            "tokens": int(tokens[token]),
            "effect": float(mean[token]),
        }
        for token in worst
        if mean[token] < 0
    ]


def print_agreement(console: Console, told: Facts) -> None:
    """The table of layers, and what predictions lose."""
    print_table(console, COLUMNS, told["layers"])
    different = told["any_difference"]
    print_line(console, f"{told['n']:,} tokens in both; {different:.2%} of them differ in some layer's experts")
    if told["effect"] is not None:
        _print_effect(console, told["effect"])


def _print_effect(console: Console, effect: Facts) -> None:
    sure = f"{effect['level']:.0%} interval {effect['low']:+.4f} to {effect['high']:+.4f}, p {effect['p']:.4f}"
    print_line(
        console,
        f"effect on predictions: {effect['effect']:+.4f} nats a token in the second capture, below 0 where it predicts"
        f" worse ({effect['untested'] or sure}; {effect['n']:,} tokens)",
    )
    if effect["lose_most"]:
        print_table(console, OF_TOKENS, effect["lose_most"])
