"""The speed of reading and counting a store: `python tests/benchmarks/analysis.py -o RESULT.json`, by hand, on a CPU.

Synthetic stores of Mixtral 8x7B's shape (see `synthetic_store`) of ten and a hundred million tokens, and of short
documents. Each measurement runs in its own process, whose peak memory is reported; rates are tokens per second of CPU
time in one thread, unless threads are named. "decode" reads the same data as every scan and does nothing else; "first
set" is load, co-activation, all transitions and repetition; "full set" also the token tables. Cold: the files were
dropped from the page cache. For comparison, on fewer tokens: OLMoE's method (Counters over lists), plain dask, and
DuckDB over a Parquet file of the same routes, a column for each layer's choices, without repetition.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import store  # noqa: E402
from analysis.metrics.choices import Choices  # noqa: E402
from analysis.metrics.repetition import Repetition  # noqa: E402
from analysis.metrics.tokens import TokenCounts  # noqa: E402
from analysis.scanning import Reducer, scan  # noqa: E402
from analysis.statistics.jackknife import Jackknife  # noqa: E402

SETS: dict[str, Callable[[], list[Reducer]]] = {
    "first set": lambda: [Choices(), Repetition()],
    "full set": lambda: [Choices(), Repetition(), TokenCounts()],
    "first set, 200 replicates": lambda: [
        Jackknife(Choices(joint=False), 200),
        Jackknife(Repetition(), 200),
    ],
}
COUNTERS_TOKENS, DASK_TOKENS, DUCKDB_TOKENS = 100_000, 2_000_000, 2_000_000


def decode(data: xr.Dataset) -> None:
    """Read shard by shard what a scan reads, and do nothing with it."""
    rows = int(data.attrs["rows_per_shard"])
    variables = xr.Dataset({name: data[name].variable for name in ("expert", "token")})
    for start in range(0, data.sizes["doc"], rows):
        variables.isel(doc=slice(start, start + rows)).load(scheduler="synchronous")


def counters(data: xr.Dataset) -> int:
    """Count like OLMoE's scripts, with Python lists and Counters: load, co-activation and first-choice transitions."""
    rows = -(-COUNTERS_TOKENS // data.sizes["position"])
    expert = data["expert"][:rows].values
    load, together, followed = Counter(), Counter(), Counter()
    for row in expert.tolist():
        for token in row:
            for layer, pair in enumerate(token):
                load.update((layer, e) for e in pair)
                together[layer, pair[0], pair[1]] += 1
                if layer:
                    followed[layer, token[layer - 1][0], pair[0]] += 1
    return expert.shape[0] * expert.shape[1]


def plain_dask(data: xr.Dataset) -> int:
    """A typical implementation with xarray over dask: comparisons per expert for load, one_hot products for the
    rest."""
    rows = -(-DASK_TOKENS // data.sizes["position"])
    expert = data["expert"][:rows]
    valid = expert[..., 0] != 255
    load = [(expert == e).where(valid).sum(("doc", "position", "k")) for e in range(8)]
    code = expert[..., 0] * 8 + expert[..., 0].shift(layer=1, fill_value=0)
    followed = [((code == c) & valid).sum(("doc", "position")) for c in range(64)]
    xr.Dataset({str(index): table for index, table in enumerate([*load, *followed])}).compute(scheduler="synchronous")
    return rows * data.sizes["position"]


def parquet_of_routes(data: xr.Dataset, path: Path) -> None:
    """One row per token, and for each layer a column with both choices as one number: the least work for SQL."""
    rows = -(-DUCKDB_TOKENS // data.sizes["position"])
    expert = data["expert"][:rows].values
    codes = (expert[..., 0] * 8 + expert[..., 1])[expert[:, :, 0, 0] != 255]
    columns = {f"layer_{index}": codes[:, index] for index in range(codes.shape[1])}
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=2**17)


def duckdb_over_parquet(path: Path, threads: int) -> dict[str, float]:
    """Load and co-activation are computed from the histogram of a layer, all transitions from that of two adjacent
    layers."""
    layers = [f"layer_{index}" for index in range(len(pq.read_schema(path)))]
    asked = [f"histogram({one}::USMALLINT * 64 + {other})" for one, other in pairwise(layers)]
    connection = duckdb.connect(config={"threads": threads})
    wall, cpu = time.perf_counter(), time.process_time()
    [answer] = connection.execute(f"SELECT count(*), {', '.join(asked)} FROM '{path}'").fetchall()
    took, used = time.perf_counter() - wall, time.process_time() - cpu
    assert all(sum(histogram.values()) == answer[0] for histogram in answer[1:])
    return rates(answer[0], took, used)


def measured(path: str, what: str, threads: int) -> dict[str, float]:
    """One measure, in this process."""
    if what == "DuckDB":
        return duckdb_over_parquet(Path(path), threads)
    data = store.open_capture(path, "synthetic")
    tokens = int(data["length"].sum())
    if what in SETS:
        scan(data.isel(doc=slice(0, int(data.attrs["rows_per_shard"]))), SETS[what](), threads=1)  # compiled once
    wall, cpu = time.perf_counter(), time.process_time()
    if what == "decode":
        decode(data)
    elif what in SETS:
        scan(data, SETS[what](), threads=threads)
    else:
        tokens = {"counters": counters, "plain dask": plain_dask}[what](data)
    return rates(tokens, time.perf_counter() - wall, time.process_time() - cpu)


def rates(tokens: int, took: float, used: float) -> dict[str, float]:
    """The result of a measurement: rates from wall and CPU seconds, and this process's peak memory."""
    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**20
    return {
        "tokens": tokens,
        "tokens_per_s": round(tokens / took),
        "tokens_per_cpu_s": round(tokens / used),
        "peak_gib": round(peak, 3),
    }


def main() -> None:
    """Create the stores, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=3, help="in a process of its own: store, measure, threads")
    parser.add_argument("--tokens", type=int, nargs="*", default=[10**7, 10**8])
    parser.add_argument("--folder", type=Path, help="where the stores are made; default a temporary one")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.measure:
        path, what, threads = options.measure
        print(json.dumps(measured(path, what, int(threads))))
        return
    from page_cache import drop_from_cache
    from synthetic_store import make_store

    rows: list[dict[str, Any]] = []

    def measure(path: Path, label: str, what: str, threads: int = 1, *, cold: bool = False) -> None:
        if cold:
            drop_from_cache(path, "*")
        command = [sys.executable, __file__, "--measure", str(path), what, str(threads)]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append({"store": label, "measure": what, "threads": threads, "cold": cold, **json.loads(told)})
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for tokens in options.tokens:
            path, label = folder / f"{tokens}.zarr", f"{tokens:,} tokens in rows of 2,048"
            make_store(path, tokens)
            for what in ("decode", "first set", "full set", "decode", "first set"):
                measure(path, label, what)
            measure(path, label, "first set", 2)
            measure(path, label, "first set", cold=True)
            if tokens == min(options.tokens):
                for what in ("first set, 200 replicates", "counters", "plain dask"):
                    measure(path, label, what)
                parquet_of_routes(store.open_capture(path, "synthetic"), folder / "routes.parquet")
                measure(folder / "routes.parquet", "Parquet of its first two million", "DuckDB")
        path = folder / "short.zarr"
        make_store(path, min(options.tokens), positions=512, filled=0.4)
        for what in ("decode", "first set", "full set"):
            measure(path, "documents of 200 tokens, rows of 512", what)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            name: version(name) for name in ("zarr", "numcodecs", "xarray", "dask", "numba", "numpy", "duckdb")
        },
        "rows": rows,
    }
    assert options.output is not None, "where to write the result: -o RESULT.json"
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
