"""Compares two S3 clients, obstore and s3fs: by hand, never a test; results/s3.json.

The server is moto's, in its own process on loopback. It is written in Python, so wall times are mostly those of the
server: the clients are compared by the CPU time that each takes for the same work. s3fs is not a dependency: `pip
install s3fs` first.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import obstore  # noqa: E402
import s3fs  # noqa: E402
import xarray as xr  # noqa: E402
from s3_server import make_bucket, start_server, stop_server, variables  # noqa: E402
from zarr.storage import FsspecStore, ObjectStore  # noqa: E402

from store import write_capture  # noqa: E402
from store.s3 import AT_ONCE, S3Objects  # noqa: E402

SMALL, MANY = b"x" * 1500, 3000  # a commit record's size; objects in a listing
SHARDS, POSITIONS, LAYERS = 4, 2048, 32
SIZES = {"6_mb": 6_000_000, "20_mb": 20_000_000}  # a shard's experts and weights


class Obstore:
    """Through obstore, as the store does."""

    def __init__(self, url: str) -> None:
        self.objects = S3Objects(url.removeprefix("s3://"), "")
        self.put, self.put_new, self.get = self.objects.put, self.objects.put_new, self.objects.get

    def list(self, prefix: str) -> int:
        return sum(len(page) for page in obstore.list(self.objects._store, prefix, chunk_size=1000))

    def zarr(self) -> Any:
        return ObjectStore(self.objects._store, read_only=True)


class S3fs:
    """Through s3fs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], use_listings_cache=False)

    def put(self, key: str, data: bytes) -> None:
        self.files.pipe_file(f"{self.url}/{key}", data, chunksize=2**30)

    def put_new(self, key: str, data: bytes) -> bool:
        try:
            self.files.pipe_file(f"{self.url}/{key}", data, mode="create", chunksize=2**30)
        except FileExistsError:
            return False
        return True

    def get(self, key: str) -> bytes:
        return bytes(self.files.cat_file(f"{self.url}/{key}"))

    def list(self, prefix: str) -> int:
        return len(self.files.find(f"{self.url}/{prefix}", detail=True))

    def zarr(self) -> Any:
        files = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], asynchronous=True)
        return FsspecStore(files, path=self.url.removeprefix("s3://"), read_only=True)


def timed(action: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Seconds of an action, and of this process's CPU in it: the fastest of a few."""
    best = (float("inf"), float("inf"))
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    return {"seconds": round(best[0], 4), "cpu_seconds": round(best[1], 4)}


def small_objects(client: Any, prefix: str) -> dict[str, Any]:
    """Hundreds of records, one after the other and at once."""
    keys = [f"{prefix}/{number}" for number in range(200)]
    rounds = iter(range(100))

    def put_new(expected: bool) -> None:
        name = next(rounds) if expected else 0
        assert all(client.put_new(f"{key}/{name}", SMALL) is expected for key in keys)

    def get_at_once() -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            assert all(data == SMALL for data in pool.map(client.get, keys))

    return {
        "put_new_200": timed(lambda: put_new(True)),
        "put_new_200_that_are_there": timed(lambda: put_new(False)),
        "put_200": timed(lambda: [client.put(key, SMALL) for key in keys]),
        "get_200": timed(lambda: [client.get(key) for key in keys]),
        f"get_200_by_{AT_ONCE}_threads": timed(get_at_once),
        f"list_{MANY}": timed(lambda: client.list("many")),
    }


def shards(client: Any, prefix: str) -> dict[str, Any]:
    """Objects of a shard's size, as bytes that do not compress."""
    results = {}
    for name, size in SIZES.items():
        data = np.random.default_rng(0).bytes(size)
        results[f"put_{name}"] = timed(lambda data=data, name=name: client.put(f"{prefix}/{name}", data))  # type: ignore[misc]
        assert client.get(f"{prefix}/{name}") == data
        results[f"get_{name}"] = timed(lambda name=name: client.get(f"{prefix}/{name}"))  # type: ignore[misc]
    return results


def make_capture(url: str) -> int:
    """A capture of Mixtral's shape, of choices that do not compress; bytes of its shards."""
    random, shape = np.random.default_rng(0), (128, POSITIONS, LAYERS, 2)  # 128 rows are a shard
    blocks = (
        {
            "token": random.integers(0, 32_000, shape[:2]),
            "expert": random.integers(0, 8, shape),
            "weight": random.random(shape),
        }
        for _ in range(SHARDS)
    )
    written = write_capture(url, "routes", blocks=blocks, num_experts=8, layers=range(LAYERS), rows_per_shard=128)
    return written.bytes_done


def read(client: Any) -> dict[str, float]:
    """All routes through Zarr and xarray, a shard at a time, on all cores."""

    def scan() -> None:
        rows = ("length", "document_id", "offset")  # whose chunks are not shards
        data = xr.open_zarr(client.zarr(), group="routes", consolidated=False, chunks={"doc": 128}, drop_variables=rows)
        assert int((data["expert"] == 255).sum()) == 0
        assert float(data["weight"].max()) <= 1

    return timed(scan, repeats=2)


def main() -> None:
    """Measure both and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "tests" / "benchmarks" / "results" / "s3.json")
    arguments = parser.parse_args()
    server, address = start_server()
    try:
        os.environ.update(variables(address))
        url = f"s3://{make_bucket(address)}/routes.zarr"
        result: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, shared; the server on the same cores",
            "server": f"moto {version('moto')}",
            "versions": {name: version(name) for name in ("obstore", "s3fs", "zarr", "xarray")},
            "capture_bytes": make_capture(url),
        }
        clients = {"obstore": Obstore(url), "s3fs": S3fs(url)}
        for number in range(MANY):
            clients["obstore"].put(f"many/{number}", b"")
        for name, client in clients.items():
            measured = small_objects(client, name) | shards(client, name) | {"read_capture": read(client)}
            result[name] = measured
    finally:
        stop_server(server)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
