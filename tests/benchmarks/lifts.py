"""Do intervals of a class's lift contain the true value? `python tests/benchmarks/lifts.py`, by hand, a minute or two.

Documents are drawn (`tests/drawn_classes.py`) and given to `class_experts_of`. `lift` and `share` are the shares of the
simulations with an interval that contains the true value, `untested` the share without an interval.

Results: tests/benchmarks/results/lifts.json.
"""

import argparse
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from drawn_classes import LIFT, documents  # noqa: E402

from analysis.metrics.class_experts import class_experts_of  # noqa: E402

CELLS = [
    (number, lengths, spread) for number in (9, 30, 300) for lengths in ("equal", "unequal") for spread in (5.0, 40.0)
]


def simulated(cell: tuple[int, str, float, int]) -> dict[str, Any]:
    """How often the true value is in the intervals."""
    number, lengths, spread, simulations = cell
    random = np.random.default_rng(list(map(ord, f"{number}{lengths}{spread}")))
    found = [class_experts_of(documents(random, number, lengths, spread)) for _ in range(simulations)]
    known = [each for each in found if np.isfinite(each["lift_low"].item())]
    held = {
        name: round(np.mean([each[f"{name}_low"].item() <= truth <= each[f"{name}_high"].item() for each in known]), 3)
        for name, truth in {"lift": LIFT, "share": 0.5}.items()
    }
    return {
        "documents": number, "lengths": lengths, "spread": spread, "simulations": simulations, **held,
        "untested": round(1 - len(known) / simulations, 3),
    }  # fmt: skip


def main() -> None:
    """Simulate, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=300, help="of a cell (default 300)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "tests/benchmarks/results/lifts.json")
    options = parser.parse_args()
    found = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for each in pool.map(simulated, [(*cell, options.simulations) for cell in CELLS]):
            found.append(each)
            print(json.dumps(each), flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy", "xarray")},
        "lifts": found,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
