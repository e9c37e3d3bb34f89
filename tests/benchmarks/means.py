"""Are equal means of two data sets told apart as often as p says? `python tests/benchmarks/means.py`, by hand.

Documents are drawn (`tests/drawn_means.py`) and given to `mean_contrast_of`. A document's mean is lognormal around 1 in
each cell; "spread" is the deviation of its logarithm, 0.7 is very skewed. Cells are independent, which is the hardest:
the largest of many statistics is furthest in the tail. `rejected` is the part of the simulations with a p of at most
5 % in any cell, `student` the same by Student's t and Šidák's bound, `untested` the part in which nothing is tested.

Results: tests/benchmarks/results/means.json. The same at fewer simulations is a test.
"""

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtr

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from drawn_means import documents  # noqa: E402

from analysis.metrics.mean_contrast import mean_contrast_of  # noqa: E402
from analysis.statistics.differences import Differences  # noqa: E402
from analysis.statistics.resampled import Totals, totals_of  # noqa: E402

REPLICATES = 399
CELLS = [
    (numbers, lengths, spreads, cells)
    for cells in (8, 256)
    for numbers, lengths, spreads in (
        ((14, 14), "equal", (0.3, 0.3)),
        ((14, 60), "equal", (0.7, 0.2)),
        ((30, 60), "unequal", (0.7, 0.2)),
        ((30, 100), "unequal", (0.2, 0.7)),
        ((30, 30), "unequal", (0.3, 0.3)),
        ((60, 60), "unequal", (0.7, 0.2)),
        ((100, 100), "equal", (0.4, 0.4)),
    )
]


def simulated(cell: tuple[tuple[int, int], str, tuple[float, float], int, int]) -> dict[str, Any]:
    """How often equal means are told apart."""
    numbers, lengths, spreads, cells, simulations = cell
    random = np.random.default_rng(list(map(ord, f"{numbers}{lengths}{spreads}{cells}")))
    rejected, student, tested = 0, 0, 0
    for _ in range(simulations):
        sides = {
            n: documents(random, size, lengths, s, cells) for n, size, s in zip("ab", numbers, spreads, strict=True)
        }
        p = mean_contrast_of(sides, "value", replicates=REPLICATES)["difference_p"].values
        if np.isnan(p).all():
            continue
        tested += 1
        rejected += int(np.nanmin(p) <= 0.05)
        student += int(_by_student([totals_of(side, "value") for side in sides]) <= 0.05)
    return {
        "documents": numbers, "lengths": lengths, "spreads": spreads, "cells": cells, "simulations": simulations,
        "rejected": round(rejected / max(1, tested), 3), "student": round(student / max(1, tested), 3),
        "untested": round(1 - tested / simulations, 3),
    }  # fmt: skip


def _by_student(sets: list[Totals]) -> float:
    """The smallest p by Student's t of the effective documents, adjusted by Šidák's bound."""
    mean, variance = (
        np.stack(each)[:, 0] for each in zip(*(s.fitted(np.ones((1, len(s.total)))) for s in sets), strict=True)
    )
    apart = Differences(np.array([[1.0, -1.0]]), mean, variance)
    with np.errstate(invalid="ignore"):
        p = 2 * stdtr(apart.degrees(np.stack([each.degrees for each in sets])), -abs(apart.statistic))
    return float(1 - (1 - np.nanmin(p)) ** np.isfinite(p).sum())


def main() -> None:
    """Simulate, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000, help="of a cell (default 1000)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "tests/benchmarks/results/means.json")
    options = parser.parse_args()
    started, found = time.monotonic(), []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for each in pool.map(simulated, [(*cell, options.simulations) for cell in CELLS]):
            found.append(each)
            print(json.dumps(each), flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy")},
        "replicates": REPLICATES,
        "seconds": round(time.monotonic() - started),
        "means": found,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
