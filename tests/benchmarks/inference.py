"""Do tests reject as often as stated, and do intervals contain the true value? `python tests/benchmarks/inference.py`,
by hand.

Documents are drawn, counted by unit as in `Jackknife(ExpertCounts())`, and given to the public functions. A document's
first choice follows its own shares, which are Dirichlet around the data set's; its second follows the same shares
without the first. "spread" is the sum of the Dirichlet's parameters: 5 is a document that prefers few experts, 100 one
that is similar to all others, none means independent tokens. Five tables:

- "rejections": two data sets of equal shares, of unlike lengths, spreads and numbers of documents; how often p is at
  most 5 %, how often there is no test, and what shuffling the documents' labels rejects, the test of earlier versions;
- "power": two data sets with a planted difference where shuffling is valid;
- "selection": the largest difference of many is picked; how often its interval contains the true value;
- "coverage": intervals of shares and of effective experts, few and unequal documents;
- "balance": the position of the measures of an even load in their drawn null.

Results: tests/benchmarks/results/inference.json. Tests run the same cells with fewer simulations.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from drawn_documents import Documents, counted, lengths  # noqa: E402

from analysis.metrics.contrast import contrast_of  # noqa: E402
from analysis.metrics.load import balance_null, balance_of, share_of_experts  # noqa: E402
from analysis.statistics.jackknife import interval  # noqa: E402

LAYERS, REPLICATES = 9, 199  # simulations that one call does, as layers of a capture; and drawn sets of documents
NUMBERS = [(5, 5), (5, 50), (8, 8), (8, 400), (12, 12), (12, 100), (20, 20), (20, 100), (50, 50), (50, 400), (100, 100)]
LENGTHS = {"200": ("200", "200"), "20 against 1000": ("20", "1000"), "unequal": ("200 ± 1", "200 ± 1")}
SPREADS: dict[str, tuple[float | None, float | None]] = {
    "none": (None, None),
    "40": (40, 40),
    "5 against 100": (5, 100),
    "100 against 5": (100, 5),
}
MORE = [  # of the issue: the same text cut otherwise, and more documents
    ("20 against 400", "none", (100, 100)),
    ("20 against 1000", "none", (12, 100)),
    ("200", "5 against 100", (12, 400)),
    ("200", "100 against 5", (12, 400)),
    ("200", "40", (400, 400)),
]
LENGTHS["20 against 400"] = ("20", "400")


def rejections(task: tuple[str, str, tuple[int, int], int, float]) -> dict[str, Any]:
    """How often equal data sets are told apart, in one cell; with a planted difference, how often unequal ones are."""
    length, spread, numbers, simulations, planted = task
    random = np.random.default_rng(abs(hash_of(task)))
    p, shuffled, effective = [], [], []
    for _ in range(-(-simulations // LAYERS)):
        sides = [
            Documents(random, lengths(random, kind, n), concentration, experts=8, planted=planted * side)
            for side, (kind, n, concentration) in enumerate(zip(LENGTHS[length], numbers, SPREADS[spread], strict=True))
        ]
        counts = [side.counts(LAYERS) for side in sides]
        found = contrast_of(
            {name: counted(count, side.tokens) for name, count, side in zip("ab", counts, sides, strict=True)},
            replicates=REPLICATES,
            threads=1,
        )
        p += found["p"].values.tolist()
        effective.append(min(found.attrs["effective_documents"].values()))
        shuffled += by_shuffling(random, counts).tolist()
    tested = ~np.isnan(p)
    return {
        "lengths": length,
        "spread": spread,
        "documents": list(numbers),
        "planted": planted,
        "effective_documents": round(float(np.mean(effective)), 1),
        "simulations": len(p),
        "untested": round(float(1 - tested.mean()), 4),
        "rejected": round(float((np.array(p)[tested] <= 0.05).mean()), 4) if tested.any() else None,
        "rejected_by_shuffling": round(float((np.array(shuffled) <= 0.05).mean()), 4),
    }


def by_shuffling(random: np.random.Generator, counts: list[np.ndarray]) -> np.ndarray:
    """p of each layer's Jensen–Shannon divergence among those of shuffled labels: the test of earlier versions."""
    whole, first = np.concatenate(counts).astype(float), len(counts[0])
    labels = np.argsort(random.random((REPLICATES, len(whole))), axis=1) < first
    labels = np.concatenate([[np.arange(len(whole)) < first], labels])
    one = np.tensordot(labels.astype(float), whole, 1)
    shares = [side / side.sum(-1, keepdims=True) for side in (one, whole.sum(0) - one)]

    def bits(share: np.ndarray) -> np.ndarray:
        return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)

    divergence = bits((shares[0] + shares[1]) / 2) - (bits(shares[0]) + bits(shares[1])) / 2
    return (1 + (divergence[1:] >= divergence[0] - 1e-12).sum(0)) / (1 + REPLICATES)


def selection(task: tuple[str, str, tuple[int, ...], float, int]) -> dict[str, Any]:
    """How often the interval of the largest difference, of all experts and layers, contains the true value."""
    length, spread, numbers, planted, simulations = task
    random = np.random.default_rng(abs(hash_of(task)))
    held, all_held, ratio, named = [], [], [], 0
    for _ in range(simulations):
        kinds = [LENGTHS[length][min(side, 1)] for side in range(len(numbers))]
        spreads = [SPREADS[spread][min(side, 1)] for side in range(len(numbers))]
        sides = [
            Documents(random, lengths(random, kind, n), concentration, experts=8, planted=planted if side == 0 else 0.0)
            for side, (kind, n, concentration) in enumerate(zip(kinds, numbers, spreads, strict=True))
        ]
        names = "abcdef"[: len(sides)]
        found = contrast_of(
            {name: counted(side.counts(4), side.tokens) for name, side in zip(names, sides, strict=True)},
            replicates=REPLICATES,
            threads=1,
        )
        share = xr.DataArray(
            [side.reach for side in sides], dims=("data_set", "expert"), coords={"data_set": list(names)}
        )
        true = share - (share.sum("data_set") - share) / (len(sides) - 1)
        if bool(found["difference_low"].isnull().all()):  # too few effective documents: no interval is printed
            continue
        inside = (found["difference_low"] <= true) & (true <= found["difference_high"])
        cell = found["difference_low"].argmax(...)
        held.append(bool(inside.isel(cell)))
        all_held.append(bool(inside.all()))
        truth = float(true.broadcast_like(found["difference"]).transpose(*found["difference"].dims).isel(cell))
        if truth > 0:
            ratio.append(float(found["difference"].isel(cell)) / truth)
        least = found["pairwise_low"].where(found["data_set"] != found["other_data_set"]).min("other_data_set")
        named += bool((least.where(true <= 1e-12) > 0).any())
    return {
        "lengths": length,
        "spread": spread,
        "documents": list(numbers),
        "planted": planted,
        "simulations": simulations,
        "untested": round(1 - len(held) / simulations, 4),
        "picked_held": round(float(np.mean(held)), 4),
        "all_held": round(float(np.mean(all_held)), 4),
        "estimate_over_truth": round(float(np.median(ratio)), 2) if ratio else None,
        "false_specialists": round(named / simulations, 4),
    }


def coverage(task: tuple[str, float | None, int, int, str, int]) -> dict[str, Any]:
    """How often intervals of an expert's share, and of effective experts, contain the true value."""
    kind, spread, number, experts, shares, simulations = task
    random = np.random.default_rng(abs(hash_of(task)))
    held: dict[str, list[bool]] = {"share": [], "effective experts": []}
    effective = []
    for _ in range(-(-simulations // LAYERS)):
        documents = Documents(random, lengths(random, kind, number), spread, experts=experts, skewed=shares == "skewed")
        found = counted(documents.counts(LAYERS), documents.tokens)
        of_share = interval(share_of_experts(found["counts"]), scale="share")
        truth = documents.reach / documents.reach.sum()
        effective.append(of_share.attrs["effective_documents"])
        inside = (of_share["low"] <= truth) & (truth <= of_share["high"])
        known = of_share["low"].notnull()
        held["share"] += inside.where(known).isel(expert=0).values.tolist()
        measured = balance_of(xr.Dataset({"share": share_of_experts(found["counts"])}, attrs=found.attrs))
        of_balance = interval(measured["effective_experts"], corrected=True)
        true = 2 ** -(truth * np.log2(truth)).sum()
        known = of_balance["low"].notnull()
        held["effective experts"] += (
            ((of_balance["low"] <= true) & (true <= of_balance["high"])).where(known).values.tolist()
        )
    return {
        "lengths": kind,
        "spread": spread,
        "documents": number,
        "experts": experts,
        "shares": shares,
        "simulations": len(held["share"]),
        "effective_documents": round(float(np.mean(effective)), 1),
        "without_interval": round(float(np.isnan(held["share"]).mean()), 4),
        "held": {name: _mean(values) for name, values in held.items()},
    }


def balance(task: tuple[str, float | None, int, int, int]) -> dict[str, Any]:
    """Where measures of an even load lie: in the middle 95 % of their drawn null, and beside their plain null."""
    kind, spread, number, experts, simulations = task
    random = np.random.default_rng(abs(hash_of(task)))
    names = ("max_violation", "gini", "effective_experts", "jain")
    inside: dict[str, list[float]] = {name: [] for name in names}
    seen: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(-(-simulations // LAYERS)):
        documents = Documents(random, lengths(random, kind, number), spread, experts=experts)
        found = counted(documents.counts(LAYERS), documents.tokens)
        null = balance_null(found, draws=REPLICATES)
        own = balance_of(xr.Dataset({"share": share_of_experts(found["counts"].isel(replicate=0))}, attrs=found.attrs))
        for name in names:
            held = (null[name].sel(of="low") <= own[name]) & (own[name] <= null[name].sel(of="high"))
            inside[name] += held.where(null[name].sel(of="low").notnull()).values.tolist()
            seen[name] += own[name].values.tolist()
    return {
        "lengths": kind,
        "spread": spread,
        "documents": number,
        "experts": experts,
        "simulations": len(seen["gini"]),
        "inside": {name: _mean(values) for name, values in inside.items()},
        "mean": {name: round(float(np.mean(values)), 4) for name, values in seen.items()},
    }


def _mean(values: list[Any]) -> float | None:
    known = np.array(values, float)
    return None if np.isnan(known).all() else round(float(np.nanmean(known)), 4)


def hash_of(task: tuple[Any, ...]) -> int:
    """A seed for a cell that is the same in every run, unlike Python's own hash of strings."""
    return int.from_bytes(json.dumps(task).encode()[-256:], "little") % 2**63


def tables(simulations: int) -> dict[str, tuple[Callable[[Any], dict[str, Any]], list[Any]]]:
    """What is simulated: for each table the function and its cells."""
    cells = [(length, spread, numbers) for length in list(LENGTHS)[:3] for spread in SPREADS for numbers in NUMBERS]
    few = [
        (kind, spread, n)
        for kind in ("200", "200 ± 1", "200 ± 1.5")
        for spread in (None, 40, 5)
        for n in (5, 8, 12, 50)
    ]
    some = max(simulations // 4, 20)
    return {
        "rejections": (rejections, [(*cell, simulations, 0.0) for cell in [*cells, *MORE]]),
        "power": (
            rejections,
            [
                ("200", spread, (n, n), some, size)
                for spread, size in (("none", 0.06), ("40", 0.25))
                for n in (12, 20, 50)
            ],
        ),
        "selection": (
            selection,
            [
                ("200", "40", (30, 30), 0.0, some),
                ("200", "40", (30, 30), 0.1, some),
                ("200", "40", (30, 30, 30), 0.3, some),
                ("unequal", "40", (20, 50), 0.1, some),
                ("200", "5 against 100", (20, 100), 0.3, some),
                ("20 against 1000", "none", (20, 100), 0.1, some),
            ],
        ),
        "coverage": (
            coverage,
            [(*cell, 8, shares, simulations) for cell in few for shares in ("even", "skewed")]
            + [("200", None, 100, 64, "even", simulations), ("200", 40, 100, 64, "even", simulations)],
        ),
        "balance": (
            balance,
            [
                (kind, spread, n, e, some)
                for kind in ("200", "200 ± 1")
                for spread in (None, 40)
                for n in (20, 100)
                for e in (8, 64)
            ],
        ),
    }


def main() -> None:
    """Simulate, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000, help="of a cell (default 2000)")
    parser.add_argument("--table", action="append", help="only these tables")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "tests/benchmarks/results/inference.json")
    options = parser.parse_args()
    started, found = time.monotonic(), {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        asked = {name: each for name, each in tables(options.simulations).items() if name in (options.table or [name])}
        waiting = {name: [pool.submit(function, cell) for cell in cells] for name, (function, cells) in asked.items()}
        for name, futures in waiting.items():
            found[name] = []
            for future in futures:
                found[name].append(future.result())
                print(name, json.dumps(found[name][-1], ensure_ascii=False), flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy", "numba")},
        "replicates": REPLICATES,
        "seconds": round(time.monotonic() - started),
        **found,
    }
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
