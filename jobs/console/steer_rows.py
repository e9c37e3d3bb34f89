"""What `jobs/steer.py` reports: the experts that distinguish a data set, and the effect on it and on another one.

Promises: the table and the JSON output have the same rows. Does not know about the command line.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs.console.contrast_rows import SHARES
from jobs.console.tables import Facts, print_line, print_table
from jobs.console.terminal import reporting
from workers.interventions import Interventions

if TYPE_CHECKING:
    import xarray as xr


def carriers_told(captures: "Mapping[str, xr.Dataset]", most: int, *, forced: bool) -> dict[str, Any]:
    """The experts that the first of two captures uses more than the other, beyond chance.

    Raises
    ------
    ValueError
        When there are none, the difference cannot be tested, or the captures are not of one model.
    """
    from analysis.metrics.carriers import carriers  # numba takes a second: --help must not wait for it
    from analysis.metrics.contrast import contrast
    from analysis.metrics.differing import shares_row

    with reporting("contrast", unit="shards", transient=True) as report:
        found = contrast(captures, progress=lambda done, total: report.add(1))
    if found.attrs["models_differ"]:
        raise ValueError(f"the captures are from different models: {'; '.join(found.attrs['models_differ'].values())}")
    one, other = captures
    taken = carriers(found, one, most=most, left=_left(captures[one], forced=forced))
    if not taken:
        raise ValueError(
            f"no expert is used more by {one} than by {other} beyond chance, so there is nothing to change"
        )
    rows = [shares_row(found, layer, expert) for layer, expert in taken]
    return {"experts": rows, "level": found.attrs["level"]}


def _left(capture: "xr.Dataset", *, forced: bool) -> dict[int, int]:
    """How many experts of each layer must not be masked or forced, in addition to those that already are."""
    from store import attributes

    attrs, k = attributes(capture), capture.sizes["k"]
    already = Interventions(mask=tuple(attrs.get("mask") or ()), force=tuple(attrs.get("force") or ()))
    of_layer = already.forced() if forced else already.masked()
    kept = int(attrs["num_experts"]) - k if forced else k
    return {layer: kept + len(of_layer.get(layer, ())) for layer in capture["layer"].values.tolist()}


def print_carriers(console: Console, told: Facts) -> None:
    """Print the table of experts."""
    print_line(console, f"experts that {told['one']} uses more than {told['other']}:")
    print_table(console, SHARES, told["experts"])
    print_line(
        console, f"shares of tokens; {told['level']:.0%} intervals and p-values are simultaneous for all experts"
    )


def print_steered(console: Console, told: Facts) -> None:
    """Print the effect on both, in one sentence."""
    first, second = told["data_sets"]
    if math.isnan(first["difference"]):
        return
    n, how = len(told["experts"]), "With {} forced" if told["change"] == "force" else "Without {}"
    changed = how.format("this expert" if n == 1 else f"these {n} experts")
    by = " and ".join(f"by {each['effect']:+.4f} nats in {each['data_set']}" for each in (first, second))
    sure = f"{told['level']:.0%} interval {first['difference_low']:+.4f} to {first['difference_high']:+.4f}"
    untested = "; ".join(f"{name}: {reason}" for name, reason in told["untested_difference"].items())
    known = untested or f"{sure}, p = {first['difference_p']:.4f}"
    print_line(
        console,
        f"{changed}, the log-probability of a token changes {by}: a difference of {first['difference']:+.4f} ({known})",
    )
