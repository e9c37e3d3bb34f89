"""Do 95 % intervals hold the truth 95 times of 100? `python tests/benchmarks/intervals.py -o RESULT.json`, by hand.

Two thousand simulated captures go through the same scans and intervals as real ones. A document has a taste of its own,
so that its tokens resemble each other; what the whole population would show is known by arithmetic:

- with probability p, drawn for each document, a token's first choice is expert 3, else any other one; the second choice
  is any other expert. The share of tokens that reach expert 3 is mean(p) + (1 - mean(p)) / (E - 1).
- with probability a, drawn for each document, a token keeps the first choice of the one before it, else draws afresh.
  The share of neighbours with a choice in common is mean(a) + (1 - mean(a)) (1 - C(E-2, 2) / C(E, 2)).
- two data sets from one population differ by 0.

Beside it, what an interval that takes tokens for independent would hold.
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

import numpy as np
import xarray as xr

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from analysis.metrics.contrast import contrast  # noqa: E402
from analysis.metrics.load import ExpertCounts  # noqa: E402
from analysis.metrics.repetition import Repetition  # noqa: E402
from analysis.scanning import scan  # noqa: E402
from analysis.statistics.resampling import Resampled, interval  # noqa: E402

EXPERTS, POSITIONS, EXPERT, REPLICATES = 8, 48, 3, 400
AFRESH = 1 - 15 / 28  # C(6, 2) / C(8, 2): nothing in common


def capture(random: np.random.Generator, documents: int, kind: str, mean: float) -> xr.Dataset:
    """One layer of routes, of which documents have a "taste" or "repeat"; the mean of p or a over documents."""
    length = random.integers(8, POSITIONS + 1, documents).astype(np.int32)
    shape = (documents, POSITIONS)
    of_document = random.beta(6 * mean, 6 * (1 - mean), (documents, 1))
    if kind == "taste":
        others = random.choice(np.delete(np.arange(EXPERTS), EXPERT), shape)
        first = np.where(random.random(shape) < of_document, EXPERT, others)
    else:
        fresh = random.random(shape) >= of_document
        start = np.maximum.accumulate(np.where(fresh, np.arange(POSITIONS), 0), axis=1)
        first = np.take_along_axis(random.integers(0, EXPERTS, shape), start, axis=1)
    second = (first + random.integers(1, EXPERTS, shape)) % EXPERTS
    inside = np.arange(POSITIONS) < length[:, None]
    expert = np.where(inside[..., None, None], np.stack([first, second], -1)[:, :, None], 255).astype(np.uint8)
    return xr.Dataset(
        {
            "expert": (("doc", "position", "layer", "k"), expert),
            "token": (("doc", "position"), np.where(inside, 2, -1).astype(np.int32)),
            "length": ("doc", length),
            "document_id": ("doc", random.integers(0, 2**40, documents)),
            "piece": ("token_id", np.array(["a", "b", "c"], dtype=object)),
        },
        coords={"layer": [0]},
        attrs={"num_experts": EXPERTS, "rows_per_shard": documents, "special_token_ids": []},
    )


def simulate(task: tuple[int, int]) -> dict[str, bool]:
    """Whether each interval of one simulation holds the truth."""
    seed, documents = task
    random = np.random.default_rng(seed)

    def holds(values: xr.DataArray, truth: float) -> bool:
        tails = interval(values)
        return bool(tails["low"] <= truth <= tails["high"])

    one = capture(random, documents, "taste", 0.3)
    count = scan(one, [Resampled(ExpertCounts(), REPLICATES)], threads=1)[0]["count"].isel(layer=0)
    truth = 0.3 + 0.7 / 7
    share = count.sel(expert=EXPERT) / count.sum("expert") * 2
    own, n = float(share[0]), int(count[0].sum()) // 2
    naive = 1.96 * np.sqrt(own * (1 - own) / n)
    repeated = scan(capture(random, documents, "repeat", 0.4), [Resampled(Repetition(joint=False), REPLICATES)])[0]
    sets = {name: capture(random, documents, "taste", 0.3) for name in "ab"}
    found = contrast(sets, replicates=REPLICATES, threads=1).sel(data_set="a", layer=0, expert=EXPERT)
    return {
        "share of an expert": holds(share, truth),
        "share of an expert, tokens taken for independent": abs(own - truth) <= naive,
        "neighbours with a choice in common": holds(repeated["any_shared"].isel(lag=0, layer=0), 0.4 + 0.6 * AFRESH),
        "difference of two data sets": bool(found["difference_low"] <= 0 <= found["difference_high"]),
        "difference at or below p = 0.05": bool(found["difference_p"] <= 0.05),
    }


def main() -> None:
    """Simulate, count, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tasks = [(seed, options.documents) for seed in range(options.simulations)]
        held = list(pool.map(simulate, tasks, chunksize=10))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "xarray", "numba")},
        "simulations": options.simulations,
        "documents": options.documents,
        "replicates": REPLICATES,
        "seconds": round(time.monotonic() - started),
        "held": {name: round(float(np.mean([one[name] for one in held])), 4) for name in held[0]},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
