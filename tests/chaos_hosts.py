"""A Ray cluster of several hosts whose links break: a part of `make chaos`.

Each partition has its own bucket. The cut hits a worker with a shard in progress, which waits until the test lets it
continue. At the end each must have the store of an undisturbed run, which `--verify` reads back, each shard committed
once, and nothing else.
"""

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fake_model import fake_capture, store_files
from faulty_model import LOAD, TOKENS_A_SHARD, Attempt, Script, numbered_texts
from hosts import Host, Network
from law import differing
from patience import HUNG_S, wait_until
from ray_head import PATIENT, RAY
from s3_hosts import Bucket, server_in
from s3_server import variables
from test_hosts import put_once
from test_ray_workers import Job

HERE = Path(__file__).parent
PORT, SHARDS, NEVER = 6379, 8, 10**6
DEAD_S = 6
"""Seconds after which a host that does not answer is considered dead."""
PORTS = {"node-manager": 7000, "dashboard-agent-grpc": 7001, "runtime-env-agent": 7002, "metrics-export": 7003}
START = [
    *(f"--{what}-port={port}" for what, port in PORTS.items()), "--object-store-memory=100000000",
    "--include-log-monitor=false", "--no-monitor",
]  # fmt: skip
"""Options of a node, without parts that the tests do not use: a node gives up if its agent is not ready within 15
seconds."""
HEAD = ["--include-dashboard=false"]
ANYWHERE = "8.8.8.8"
"""The address that a Ray process would contact to learn its own address; nothing is sent."""
OPTIONS: Mapping[str, Any] = {"shards": SHARDS, "seconds": 0.05, "workers": 2, "node_s": HUNG_S}


class Cluster:
    """A Ray cluster with its head on the host "head", and an S3 server on the host "store".

    Parameters
    ----------
    network
        The network of the hosts.
    folder
        For its files and those of the tests.
    environment
        The environment of everything that runs in it.
    """

    def __init__(self, network: Network, folder: Path, environment: dict[str, str]) -> None:
        self.network, self.folder = network, folder
        for host in network.hosts.values():
            own = folder / host.name
            own.mkdir()
            host.run(["mount", "--bind", own, environment["RAY_TMPDIR"]])
            host.ip("route", "add", ANYWHERE, "dev", "eth0")
        self.environment = {**environment, "RAY_ADDRESS": f"{network['head'].address}:{PORT}"}

    def start(self) -> None:
        """Start the head."""
        self._start("head", "--head", f"--port={PORT}", "--num-cpus=0", *HEAD)

    def begin(self) -> None:
        """Restore all links, with a new bucket and a new script."""
        self.network.mend()
        for name in self.network.hosts:
            self.network.plug(name)
        self.join("b", "c")
        self.work = Path(tempfile.mkdtemp(dir=self.folder))
        self.script = Script(self.work / "script")
        self.bucket = Bucket(self.network["store"], self.environment["AWS_ENDPOINT_URL"])
        self.hold(*range(SHARDS))

    def join(self, *names: str, gpus: int = 1) -> None:
        """Let hosts join the cluster that are not part of it."""
        for name in names:
            if not self.has_a_node(name):
                self._start(
                    name, f"--address={self.environment['RAY_ADDRESS']}", f"--num-gpus={gpus}", f"--num-cpus={gpus}"
                )

    def _start(self, name: str, *options: str) -> None:
        """Start a node; try again if it gives up."""
        host = self.network[name]
        command = [*RAY, "start", *options, f"--node-ip-address={host.address}", *START]

        def starts() -> bool:
            host.signal(signal.SIGKILL)  # remains of the previous try
            with (self.folder / f"{name}.log").open("a") as log:
                return host.popen(command, stdout=log, stderr=log, env=self.environment).wait(HUNG_S) == 0

        wait_until(starts, f"the node on {name} starts")

    def has_a_node(self, name: str) -> bool:
        """Whether a node listens on a host, as seen from that host."""
        host = self.network[name]
        with suppress(OSError), host.network():
            socket.create_connection((host.address, PORTS["node-manager"]), timeout=HUNG_S).close()
            return True
        return False

    def leave(self, name: str, number: signal.Signals) -> None:
        """Shut a host down, or switch it off."""
        self.network[name].signal(number)
        wait_until(lambda: not self.has_a_node(name), f"nothing listens on {name}")

    @contextmanager
    def job(self, name: str = "head", **options: Any) -> Iterator[Job]:
        """A driver on a host."""
        folder = self.work / f"job on {name}"
        folder.mkdir()
        given = {**OPTIONS, "store": self.bucket.url, "script": str(self.script.folder), **options}
        place: Any = _Place(self.network[name], self.environment)
        with Job(place, folder, **given) as job:
            yield job

    def attempts(self, host: str, shard: int | None = None) -> list[Attempt]:
        """Attempts on a host, at a shard or at any."""
        found = [one for one in self.script.attempts() if one.host == host and one.what != LOAD]
        return [one for one in found if shard is None or one.what == str(shard)]

    def begun(self, job: Job, host: str, shard: int | None = None, count: int = 1) -> int:
        """Wait until a number of shards have started on a host; returns the last one."""
        job.until(lambda: len(self.attempts(host, shard)) >= count, f"{host} has begun {count} shards")
        return int(self.attempts(host, shard)[count - 1].what)

    def hold(self, *shards: int, on: str = "") -> None:
        """From now on only these shards wait, on one host or on all."""
        for shard in range(SHARDS):
            self.script.write(shard, *[f"hold {on}".strip()] * (shard in shards))

    def committed_by(self, job: Job, shard: int, host: str) -> None:
        """Wait until a shard is committed, and return who committed it."""
        key = f"fake/expert/commits/{shard}.json"
        job.until(lambda: key in self.bucket.puts(), f"shard {shard} is committed")
        assert f'"worker": "{host}:' in self.bucket.files()[key].decode()

    def law(self) -> dict[str, Any]:
        """Check what must hold at the end; returns how many shards were started again."""
        clean = self.work / "clean.zarr"
        assert fake_capture(clean, numbered_texts(SHARDS), batch_tokens=TOKENS_A_SHARD).complete
        expected, files = store_files(clean), self.bucket.files()
        assert differing(files, expected) == []
        assert files.keys() == expected.keys(), "something is left beside what was captured"
        put_once(self.bucket, SHARDS)
        status = [sys.executable, HERE.parent / "jobs" / "status.py", self.bucket.url, "--verify"]
        self.network["store"].run(status, env=self.environment)
        times = Counter(one.what for one in self.script.attempts() if one.what != LOAD)
        return {"computed again": times.total() - SHARDS}


class _Place:
    """Where `Job` starts a driver."""

    def __init__(self, host: Host, environment: dict[str, str]) -> None:
        self.popen, self.environment = host.popen, environment


@contextmanager
def cluster(*names: str, dead_s: float = DEAD_S) -> Iterator[Cluster]:
    """A cluster of a head, a store, and these hosts, which have not joined yet."""
    folder = Path(tempfile.mkdtemp(prefix="ea", dir="/tmp"))  # short: a socket's path has 107 characters
    (folder / "ray").mkdir()
    settings = {
        "RAY_gcs_server_port_wait_time_s": str(HUNG_S),
        "RAY_gcs_server_request_timeout_seconds": str(HUNG_S),
        "RAY_raylet_start_wait_time_s": "30",
        "RAY_enable_worker_prestart": "0",
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": str(int(250 * dead_s)),
        "RAY_health_check_failure_threshold": "4",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder / "ray"),
        "PYTHONPATH": str(HERE),
        "NO_PROXY": "*",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    try:
        with Network(["head", "store", *names]) as network, server_in(network["store"]) as address:
            found = Cluster(network, folder, {**inherited, **variables(address), **PATIENT, **settings})
            found.start()
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def two_at_work(on: Cluster, job: Job) -> tuple[int, int]:
    """The shards that wait on the hosts "b" and "c"."""
    return on.begun(job, "b"), on.begun(job, "c")


def driver_lost_for_a_while(on: Cluster) -> None:
    """A worker's host loses the driver and keeps the store; the link returns before Ray considers the node dead."""
    with on.job() as job:
        shard, _ = two_at_work(on, job)
        on.network.cut("head", "b")
        on.hold(shard)
        on.begun(job, "c", shard)  # at the end, a late shard is given to another worker
        on.hold(shard, on="c")
        on.committed_by(job, shard, "b")
        on.network.mend()
        assert job.status() == 0, job.said
        assert "was lost" not in job.said


def driver_lost(on: Cluster) -> None:
    """A worker's host loses the driver and keeps the store; the link returns after Ray considers the node dead."""
    with on.job() as job:
        shard, _ = two_at_work(on, job)
        on.network.cut("head", "b")
        job.until(lambda: "was lost with its node b" in job.said, "the node is taken for dead")
        on.hold(shard)
        on.begun(job, "c", shard)
        on.hold(shard, on="c")
        on.committed_by(job, shard, "b")
        on.network.mend()
        job.until(lambda: not on.has_a_node("b"), "the node is told that it is dead, and ends")
        on.hold()
        assert job.status() == 0, job.said


def store_lost(on: Cluster) -> None:
    """A worker's host keeps the driver and loses the store, in the middle of a shard."""
    with on.job(patience_s=2) as job:
        shard, other = two_at_work(on, job)
        on.network.cut("store", "b")
        on.hold(other)
        job.until(lambda: " on b is replaced: ConnectionError" in job.said, "its storage fails")
        on.hold()
        assert job.status() == 0, job.said
        assert "is quarantined" not in job.said, "no shard is blamed"
    assert on.attempts("c", shard)


def driver_taken_over(on: Cluster) -> None:
    """The driver's host is cut off from everything, another host takes over, and the first one comes back."""
    on.join("one", "other", gpus=0)
    with on.job("one") as first:
        two_at_work(on, first)
        on.network.unplug("one")
        with on.job("other", stale_s=3.0) as second:
            second.until(lambda: f"fake: {SHARDS} documents" in second.said, "it has taken over, and plans")
            on.hold()  # also the shards of the first driver's workers, if they are alive
            assert second.status() == 0, second.said
        on.network.plug("one")
        assert first.status() == 1, first.said
        assert "was taken over by another job" in first.said


def node_that_returns(on: Cluster) -> None:
    """A node is switched off, joins again under its address, is shut down in order, and joins again."""
    with on.job() as job:
        two_at_work(on, job)
        for times, number in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
            on.leave("b", number)
            job.until(lambda times=times: job.said.count("was lost with its node b") == times, "it is lost")
            on.join("b")
            on.begun(job, "b", count=times + 1)
        on.hold()
        assert job.status() == 0, job.said
    assert len({one.process for one in on.attempts("b")}) == 3


PARTITIONS: Sequence[tuple[float, Sequence[Callable[[Cluster], None]]]] = [
    (NEVER, [driver_lost_for_a_while]),
    (DEAD_S, [driver_lost, store_lost, node_that_returns, driver_taken_over]),
]
"""The partitions, with the seconds after which Ray considers a host dead that does not answer."""


def partitions() -> Iterator[dict[str, Any]]:
    """Each of them; the rows of its table."""
    try:
        Network([]).__exit__()
    except OSError as error:
        if os.environ.get("REQUIRE_HOSTS") == "1":
            raise
        yield {"what": f"left out, because no hosts can be made here: {error}", "times": 0, "survived": 0}
        return
    for dead_s, parts in PARTITIONS:
        with cluster("b", "c", "one", "other", dead_s=dead_s) as on:
            for part in parts:
                yield tried(part, on)


def tried(part: Callable[[Cluster], None], on: Cluster) -> dict[str, Any]:
    """A partition's row. If it fails, the others are still tried."""
    row = {"what": (part.__doc__ or "").rstrip("."), "times": 1, "survived": 0}
    try:
        on.begin()
        started = time.monotonic()
        part(on)
        found = on.law()
    except Exception:
        traceback.print_exc()
        return row
    return {**row, **found, "survived": 1, "seconds": round(time.monotonic() - started, 1)}
