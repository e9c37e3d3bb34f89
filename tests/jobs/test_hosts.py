"""Two hosts, made by `hosts`, that capture into one store: which one takes over, and which one stops.

The partitions of a Ray cluster are in `chaos_hosts.py`, because they take long.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from select import select
from typing import Any

import psutil
import pytest
from fake_model import TEXTS, fake_capture, store_files
from hosts import Host, Network, network_or_skip
from law import differing
from more import MORE
from patience import HUNG_S, NEVER_S, wait_until
from s3_hosts import Bucket, server_in
from s3_server import variables

HERE = Path(__file__).parents[1]
RENEW_S, STALE_S = 0.1, 1.0
COMMIT = "put_new fake/expert/commits/2.json"
WRITES = [
    COMMIT,
    "put_new fake/expert/c/2/0/0/0",
    "put_new fake/token/c/3/0",
    "put_over fake/token/plan.json",
    "put_over fake/length/zarr.json",
    "put_new fake/zarr.json",
    "put_new fake/expert/environment.json",
]
"""Steps during which a driver is cut off: the first one here, all of them in `make chaos`."""
OVERTAKEN = re.compile("was (taken over|made) by another job|another job that assumed this one dead writes it")
COMMITTED = re.compile("fake/(expert|weight)/c/|fake/expert/commits/")
"""Keys of commits, and of objects that are put before them."""
SHARDS = 5

pytestmark = pytest.mark.slow


class Driver:
    """Captures in a host, one after the other.

    Parameters
    ----------
    environment
        Variables for the store.
    """

    def __init__(self, host: Host, environment: dict[str, str]) -> None:
        self.host = host
        command = [sys.executable, "-W", "error", HERE / "hosts_driver.py"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = host.popen(command, env=environment, text=True, **pipes)

    def start(self, folder: Path, store: object, **options: Any) -> None:
        """Start a capture, or with `verify` a verification, whose files are in a folder of the host's name."""
        self.folder = folder / self.host.name
        self.folder.mkdir(exist_ok=True)
        default = {"renew_s": RENEW_S, "stale_s": STALE_S, "holds": [], "until_lost": False, "verify": False}
        assert self.process.stdin is not None
        line = {**default, "store": str(store), "folder": str(self.folder), **options}
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()

    def held(self, number: int = 0) -> None:
        """Wait until it is held."""

        def holds() -> bool:
            assert not select([self.process.stdout], [], [], 0)[0], f"it has ended:\n{self.said}"
            return (self.folder / f"held {number}").exists()

        wait_until(holds, f"{self.host.name} holds")

    def go(self, number: int = 0) -> None:
        """Let it continue."""
        (self.folder / f"go {number}").touch()

    def status(self) -> int:
        """Its exit status, once it has ended."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def take_over(self, folder: Path, store: object) -> None:
        """Capture as soon as it is no longer rejected."""
        end = 0
        while True:
            self.start(folder, store)
            if (status := self.status()) != 1 or "is being captured by process" not in self.said[end:]:
                break
            end = len(self.said)
        assert status == 0, self.said

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the capture, and to nothing else."""
        psutil.Process(self.process.pid).children(recursive=True)[-1].send_signal(number)

    @property
    def said(self) -> str:
        """What its captures have printed."""
        return (self.folder / "log").read_text()


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two hosts and the host of the store."""
    with network_or_skip("one", "other", "store") as network:
        yield network


@pytest.fixture(scope="module")
def address(network: Network) -> Iterator[str]:
    """The S3 server in the host of the store."""
    with server_in(network["store"]) as address:
        yield address


@pytest.fixture(scope="module")
def drivers(network: Network, address: str) -> Iterator[list[Driver]]:
    """A driver in each of the two hosts."""
    environment = {**os.environ, **variables(address)}
    drivers = [Driver(network[name], environment) for name in ("one", "other")]
    yield drivers
    for driver in drivers:
        driver.process.communicate(timeout=HUNG_S)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of an undisturbed run."""
    store = tmp_path_factory.mktemp("clean") / "routes.zarr"
    assert fake_capture(store, TEXTS).complete
    return store_files(store)


@pytest.fixture
def bucket(network: Network, address: str) -> Bucket:
    """An empty bucket."""
    return Bucket(network["store"], address)


def the_law(driver: Driver, store: object, files: dict[str, bytes], clean: dict[str, bytes]) -> None:
    """The store equals that of the undisturbed run, nothing else remains, and it is read back without a fault."""
    assert differing(files, clean) == []
    assert files.keys() == clean.keys(), "a lease, or what is not whole, is left"
    driver.start(driver.folder.parent, store, verify=True)
    assert driver.status() == 0, driver.said


def put_once(bucket: Bucket, shards: int) -> None:
    """No commit, and no object that a commit names, was ever put again or removed."""
    puts = {key: number for key, number in bucket.puts().items() if COMMITTED.match(key)}
    assert {key: number for key, number in puts.items() if number > 1} == {}
    assert len(puts) == 3 * shards
    assert bucket.uploads() == []


@pytest.mark.parametrize("arrives", [False, True][: None if MORE > 1 else 1], ids=lambda arrives: f"arrives={arrives}")
@pytest.mark.parametrize("write", WRITES[: None if MORE > 1 else 1])
def test_a_driver_that_is_cut_off_in_the_middle_of_a_put_and_comes_back_after_a_takeover_stops_and_changes_nothing(
    network: Network,
    drivers: list[Driver],
    bucket: Bucket,
    clean: dict[str, bytes],
    tmp_path: Path,
    write: str,
    arrives: bool,
) -> None:
    one, other = drivers
    one.start(tmp_path, bucket.url, holds=[write], until_lost=True)
    one.held()
    if arrives:  # and its answer does not
        network.cut("store", "one", both=False)
    else:
        network.unplug("one")
    one.go()
    other.take_over(tmp_path, bucket.url)
    assert differing(bucket.files(), clean) == [], "complete while the first one is still cut off"
    network.plug("one")
    network.mend()
    assert one.status() == 1, one.said
    assert OVERTAKEN.search(one.said), one.said
    the_law(other, bucket.url, bucket.files(), clean)
    put_once(bucket, SHARDS)


@pytest.mark.parametrize("write", WRITES[: None if MORE > 1 else 1])
def test_a_driver_that_is_stopped_for_longer_than_its_lease_and_continued_stops_by_itself(
    network: Network, drivers: list[Driver], clean: dict[str, bytes], tmp_path: Path, write: str
) -> None:
    store = tmp_path / "routes.zarr"
    one, other = drivers
    one.start(tmp_path, store, holds=[write], until_lost=True)
    one.held()
    one.signal(signal.SIGSTOP)
    other.take_over(tmp_path, store)
    assert differing(store_files(store), clean) == []
    one.go()
    one.signal(signal.SIGCONT)
    assert one.status() == 1, one.said
    assert OVERTAKEN.search(one.said), one.said
    the_law(other, store, store_files(store), clean)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("number", range(MORE))
def test_of_two_jobs_that_start_in_the_same_moment_on_two_hosts_one_captures_and_the_other_says_why_it_does_not(
    network: Network,
    drivers: list[Driver],
    bucket: Bucket,
    clean: dict[str, bytes],
    tmp_path: Path,
    kind: str,
    number: int,
) -> None:
    store = bucket.url if kind == "bucket" else tmp_path / "routes.zarr"
    for driver in drivers:
        driver.start(tmp_path, store, holds=["put_new fake/token/lease.json", COMMIT], stale_s=NEVER_S)
    for driver in drivers:
        driver.held()
    for driver in drivers:
        driver.go()
    captures = [driver.folder / "held 1" for driver in drivers]
    wait_until(lambda: any(held.exists() for held in captures), "one of them captures")
    winner, loser = sorted(drivers, key=lambda driver: not (driver.folder / "held 1").exists())
    assert loser.status() == 1
    assert "is being captured by process" in loser.said
    winner.go(1)
    assert winner.status() == 0, winner.said
    files = bucket.files() if kind == "bucket" else store_files(tmp_path / "routes.zarr")
    the_law(loser, store, files, clean)
    if kind == "bucket":
        put_once(bucket, SHARDS)
