"""Do intervals of the effect contain the true value, and is p correct? `python tests/benchmarks/effects.py`, by hand.

Documents whose effect is 0 on average are drawn (`tests/drawn_effects.py`) and given to `effect_of`. `covered` is the
share of the simulations with an interval that contains 0, and `rejected` the share with a p of at most 5 %.
`class_covered` is the same for the intervals of eight classes of tokens, each by itself, and `class_rejected` the share
of the simulations with a p of at most 5 % for any class, because these p hold for all of them together. `untested` is
the share without an interval.

Results: tests/benchmarks/results/effects.json. A test does the same with fewer simulations.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from drawn_effects import LENGTHS, SHAPES, documents  # noqa: E402

from analysis.metrics.effect import effect_of  # noqa: E402

REPLICATES = 399
CLASSES = 8
NUMBERS = (6, 9, 15, 30, 60, 300)
CELLS = [
    (number, lengths, shape)
    for number in NUMBERS
    for lengths in LENGTHS
    for shape in SHAPES
    if (lengths, shape) != ("equal", "with length")
]


def simulated(cell: tuple[int, str, str, int]) -> dict[str, Any]:
    """How often an effect of 0 is in the interval, and how often it is rejected."""
    number, lengths, shape, simulations = cell
    random = np.random.default_rng(list(map(ord, f"{number}{lengths}{shape}")))
    found = [
        effect_of(documents(random, number, lengths, shape, CLASSES), replicates=REPLICATES) for _ in range(simulations)
    ]
    tested = [each for each in found if not each.attrs["untested"]]
    covered = [float(each["low"]) <= 0 <= float(each["high"]) for each in tested]
    rejected = [float(each["p"]) <= 0.05 for each in tested]
    ends = [np.stack([each[f"class_{end}"].values for end in ("low", "high")]) for each in tested]
    class_covered = [held for low, high in ends for held in ((low <= 0) & (high >= 0))[np.isfinite(low)]]
    class_rejected = [bool((each["class_p"].values <= 0.05).any()) for each in tested]
    return {
        "documents": number, "lengths": lengths, "shape": shape, "simulations": simulations,
        "covered": _mean(covered), "rejected": _mean(rejected), "class_covered": _mean(class_covered),
        "class_rejected": _mean(class_rejected), "untested": round(1 - len(tested) / simulations, 3),
    }  # fmt: skip


def _mean(values: Any) -> float | None:
    return round(float(np.mean(values)), 3) if len(values) else None


def main() -> None:
    """Simulate, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=300, help="of a cell (default 300)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "tests/benchmarks/results/effects.json")
    options = parser.parse_args()
    started, found = time.monotonic(), []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for each in pool.map(simulated, [(*cell, options.simulations) for cell in CELLS]):
            found.append(each)
            print(json.dumps(each), flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy", "xarray")},
        "replicates": REPLICATES,
        "classes": CLASSES,
        "seconds": round(time.monotonic() - started),
        "effects": found,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
