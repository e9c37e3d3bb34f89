"""The long tests of faults: `make chaos`, 25 minutes on two cores; `make test` has a short form.

It runs the tests of faults with many more examples, which differ each time, a capture through all faults of a cluster,
and tens of thousands of shards. A table of all results is printed last and kept. The exit status is 1 if anything
failed.
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
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULT = HERE / "benchmarks" / "results" / "chaos.json"
TESTS: Mapping[str, Sequence[str]] = {
    "every interleaving": ["store/test_interleavings.py"],
    "power lost": ["store/test_power_loss.py"],
    "killed at each write": ["jobs/test_crash.py"],
    "disks full, read-only, forbidden, removed": ["store/test_storage_faults.py"],
    "S3, and a network that breaks": ["store/test_s3.py", "store/test_s3_faults.py"],
    "workers come, go and break": ["jobs/test_ray_workers.py", "jobs/test_dispatch.py"],
    "two hosts, one store, and a link that breaks": ["jobs/test_hosts.py"],
    "stores of older versions": ["store/test_schema.py"],
    "nobody gets in": ["test_security.py"],
    "bad input": ["test_fuzz.py", "jobs/test_hostile.py"],
}
COLUMNS = ("what", "times", "survived", "computed again", "seconds")
TIMEOUT_S = 7200
Row = dict[str, Any]


class Cases:
    """Counts the cases of tests: the examples that a test draws, or the test itself."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest at the start, in the middle and at the end of each test."""
        name = report.nodeid
        self.seconds[name] = self.seconds.get(name, 0) + report.duration
        if report.failed:
            self.failed.add(name)
            self.tried.setdefault(name, 1)
        if report.when == "call" and not report.skipped:
            self.tried[name] = int(dict(report.user_properties).get("examples", 1))
        if drawn := re.findall(r"(\d+) passing", report.__dict__.get("_hypothesis_stats", "")):
            self.tried[name] = max(1, sum(map(int, drawn)))


def tests(options: argparse.Namespace) -> Iterator[Row]:
    """The tests of faults; each drawn example counts once."""
    os.environ["EXAMPLES"] = str(options.examples)
    cases = Cases()
    files = [str(HERE / file) for part in TESTS.values() for file in part]
    how = ["-n", str(os.cpu_count()), "--dist", "worksteal", "-o", f"timeout={TIMEOUT_S}", "-p", "no:cacheprovider"]
    ended = pytest.main([*how, "-q", "--rootdir", str(HERE.parent), *files], plugins=[cases])
    if ended != pytest.ExitCode.OK and not cases.failed:  # a file that cannot be imported does not fail a test
        raise RuntimeError(f"pytest ended with {ended!r}, and no test failed")
    for what, part in TESTS.items():
        names = [name for name in cases.seconds if name.partition("::")[0].removeprefix("tests/") in part]
        failed = sorted(cases.failed.intersection(names))
        yield {
            "what": f"{what}: {sum(name in cases.tried for name in names)} tests",
            "times": sum(cases.tried.get(name, 0) for name in names),
            "survived": sum(cases.tried.get(name, 0) for name in names if name not in failed),
            "seconds": round(sum(cases.seconds[name] for name in names), 1),
            **({"failed": failed} if failed else {}),
        }


def cluster(options: argparse.Namespace) -> Iterator[Row]:
    """One capture of 240 shards through all faults of a cluster; the seconds are those until a shard is started
    again."""
    from chaos_cluster import chaos

    with tempfile.TemporaryDirectory() as folder:
        yield from chaos(Path(folder))


def hosts(options: argparse.Namespace) -> Iterator[Row]:
    """Ray clusters of hosts in namespaces, without network hardware; seconds are a cluster's and its partition's."""
    from chaos_hosts import partitions

    yield from partitions()


def scale(options: argparse.Namespace) -> Iterator[Row]:
    """Many shards, and the speed of the driver; the seconds are its duration."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scale.json"
        sizes = ["--sizes", str(options.shards), "--actors", "1", "8"]
        command = [sys.executable, HERE / "benchmarks" / "scale.py", "-o", path, *sizes]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(path.read_text())
    for what, measured in found["shards"][str(options.shards)].items():
        yield {
            "what": f"{what.replace('_', ' ')}, {measured['peak_gib']} GiB",
            "times": options.shards,
            "survived": options.shards if measured["peak_gib"] < 1 else 0,
            "seconds": measured["seconds"],
        }
    needed = found["needed"]
    for actors, measured in found["dispatch"].items():
        given, enough = measured["shards_per_s"], needed["shards_per_s"]
        yield {
            "what": f"given to {actors} idle workers: {given:,} shards/s; {needed['gpus']} GPUs take {enough}",
            "times": 1,
            "survived": int(given > enough),
        }


# The tests come first: pytest must be the first to import them and their modules.
PARTS: Mapping[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "tests": tests,
    "cluster": cluster,
    "hosts": hosts,
    "scale": scale,
}


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A part: its rows, the time and the machine. If it fails, a row says so and the other parts continue."""
    rows: list[Row] = []
    started = time.monotonic()
    try:
        rows.extend(PARTS[name](options))
    except Exception as error:
        traceback.print_exc()
        rows.append({"what": f"{name} ended: {type(error).__name__}", "times": 1, "survived": 0})
    return {
        "command": f"python tests/chaos.py --parts {name} --examples {options.examples} --shards {options.shards}",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {package: version(package) for package in ("ray", "zarr", "obstore", "hypothesis")},
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }


def table(parts: Mapping[str, dict[str, Any]]) -> Table:
    """All rows, part by part."""
    drawn = Table(title="chaos")
    for column in COLUMNS:
        drawn.add_column(column, justify="left" if column == "what" else "right", overflow="fold")
    for name, part in parts.items():
        drawn.add_section()
        drawn.add_row(f"[bold]{name}[/]: {PARTS[name].__doc__}")
        drawn.add_row(f"{part['date']}, {part['hardware']}", "", "", "", f"{part['seconds']:,}")
        for row in part["rows"]:
            mark = "" if row["survived"] == row["times"] else "[red]"
            drawn.add_row(*(mark + _shown(row.get(column)) for column in COLUMNS))
            for test in row.get("failed", []):
                drawn.add_row(f"[red]  {test}")
    return drawn


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)


def main() -> int:
    """Run the parts, keep their results, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="the file keeps the others"
    )
    parser.add_argument("--examples", type=int, default=20, help="so many times as many as in make test (20)")
    parser.add_argument("--shards", type=int, default=38_000, help="of the part on scale (38000)")
    parser.add_argument("-o", "--output", type=Path, default=RESULT, help=f"{RESULT.relative_to(HERE.parent)}")
    options = parser.parse_args()
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in PARTS:
        if name in options.parts:
            kept[name] = run(name, options)
            options.output.write_text(json.dumps(kept, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 120).print(table(kept))
    rows = [row for part in kept.values() for row in part["rows"]]
    return int(any(row["survived"] != row["times"] for row in rows))


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "jobs")]
    sys.exit(main())
