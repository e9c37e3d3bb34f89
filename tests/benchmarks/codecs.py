"""Which codecs are fast enough for many choices per token: `python tests/benchmarks/codecs.py STORE/DATASET -o
RESULT.json`.

Reads the first full shards of a capture, encodes `expert` and `weight` with each candidate in inner chunks of several
sizes, and prints bytes per token and tokens/s of encoding and decoding in one thread. Blosc's own threads are disabled,
so that rates are for one core.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from store.group import CaptureGroup
from store.layout import ArraySpec

CANDIDATES = {
    "expert": [
        ("lz4", 5, "bitshuffle"),
        ("zstd", 1, "bitshuffle"),
        ("zstd", 5, "bitshuffle"),
        ("zstd", 3, "noshuffle"),
    ],
    "weight": [("zstd", 5, "shuffle"), ("zstd", 1, "shuffle"), ("lz4", 5, "shuffle"), ("zstd", 3, "bitshuffle")],
}
CHOICES = (2**20, 2**21, 2**22)  # of an inner chunk at most; the layout's is 2**21


def chunk_of(spec: ArraySpec, choices: int) -> tuple[int, ...]:
    """An inner chunk with a maximum number of choices, of all layers, in a shard's rows."""
    assert spec.shard is not None
    positions = spec.chunk[1]
    rows = max(1, choices // (positions * spec.trailing[1] * spec.trailing[2]))
    while spec.shard[0] % rows:
        rows -= 1
    return (rows, *spec.chunk[1:])


def seconds_of(run: Callable[[], Any], times: int) -> float:
    """Median of a few runs."""
    took = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def main() -> None:
    """Read, encode, decode, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capture", help="STORE/DATASET")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    numcodecs.blosc.set_nthreads(1)
    zarr.config.set({"threading.max_workers": 1})
    store, _, name = options.capture.rpartition("/")
    group = CaptureGroup(store, name)
    arrays = zarr.open_group(store, mode="r")[name]
    rows = group.layout.rows_per_shard
    tokens = int(np.asarray(arrays["length"][:rows]).sum())
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}; one of them used",
        "capture": {key: group.attrs[key] for key in ("model", "quantization") if key in group.attrs},
        "layers": len(group.layout.layers), "experts_per_token": group.layout.experts_per_token,
        "tokens": tokens, "rows": [],
    }  # fmt: skip
    for array, candidates in CANDIDATES.items():
        values, spec = np.asarray(arrays[array][:rows]), group.layout.arrays()[array]
        for choices in CHOICES:
            for cname, level, shuffle in candidates if choices == CHOICES[1] else candidates[:1]:
                codec = BloscCodec(cname=cname, clevel=level, shuffle=shuffle, typesize=values.itemsize)
                tried = replace(spec, chunk=chunk_of(spec, choices), compressors=(codec, Crc32cCodec()))
                data = tried.encode(values)
                row = {"array": array, "codec": f"{cname} {level} {shuffle}", "chunk": list(tried.chunk)}
                row["bytes_per_token"] = round(len(data) / tokens, 2)
                row["encoded_tokens_per_s"] = round(tokens / seconds_of(partial(tried.encode, values), options.times))
                decode = seconds_of(partial(tried.decode, data, len(values)), options.times)
                row["decoded_tokens_per_s"] = round(tokens / decode)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
