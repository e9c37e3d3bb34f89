"""Captures on several nodes with all kinds of failures: what ends, how, and with which bytes.

The nodes are those of `ray_nodes`, the model and its faults those of `faulty_model`. A fault is planted at the start of
a shard, and the test waits for it: only the duration of the tests depends on the machine's speed.
"""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_model import fake_capture, store_files
from faulty_model import CLOCK, LOAD, TOKENS_A_SHARD, Attempt, Script, numbered_texts
from patience import HUNG_S, NEVER_S, wait_until
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError
from ray_nodes import Nodes, ray_nodes

from jobs.cluster import ray_workers
from store import coverage

HERE = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Three nodes with a GPU each."""
    with ray_nodes(3, HERE) as nodes:
        yield nodes


class Job:
    """A driver that captures into a folder.

    Parameters
    ----------
    options
        Of `cluster_driver.py`.
    """

    def __init__(self, nodes: Nodes, folder: Path, *, shards: int = 8, seconds: float = 0.05, **options: Any) -> None:
        self.store = folder / "routes.zarr"
        self.script, self.log = Script(folder / "script"), folder / "log"
        given = {"store": str(self.store), "script": str(self.script.folder), "device": "cuda", **options}
        arguments = json.dumps({**given, "shards": shards, "seconds": seconds})
        with self.log.open("w") as log:
            self.process = nodes.popen(
                [sys.executable, "-W", "error", str(HERE / "cluster_driver.py"), arguments],
                stdout=log, stderr=log, cwd=folder, env=nodes.environment,
            )  # fmt: skip

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def status(self) -> int:
        """Its exit status, once it has ended."""
        try:
            return self.process.wait(HUNG_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job does not end:\n{self.said}") from None

    @property
    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text()

    def attempts(self, what: object) -> list[Attempt]:
        """Attempts at a shard, by this job and earlier ones."""
        return [attempt for attempt in self.script.attempts() if attempt.what == str(what)]

    def begun(self, shard: int) -> Attempt:
        """The first attempt at a shard, once there is one."""
        self.until(lambda: bool(self.attempts(shard)), f"shard {shard} is begun")
        return self.attempts(shard)[0]

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait while it runs."""

        def ended_or_happened() -> bool:
            assert self.process.poll() is None, f"it ended before {what}:\n{self.said}"
            return happened()

        try:
            wait_until(ended_or_happened, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}:\n{self.said}") from None


def comparable(store: Path) -> dict[str, Any]:
    """Every complete file of a store; of commits only the parts that do not depend on their writer and its speed."""
    files: dict[str, Any] = {key: data for key, data in store_files(store).items() if "/partial/" not in key}
    for key in [key for key in files if "/commits/" in key]:
        record = json.loads(files[key])
        files[key] = {name: value for name, value in record.items() if name not in ("seconds", "worker")}
    return files


def quiet(folder: Path, shards: int) -> dict[str, Any]:
    """The files of the same capture by `--local`, with an engine without faults."""
    store = folder / "quiet.zarr"
    assert fake_capture(store, numbered_texts(shards), batch_tokens=TOKENS_A_SHARD).complete
    return comparable(store)


def test_a_machine_that_shuts_down_in_order_takes_its_workers_first_and_gives_their_shards_no_strike(
    nodes: Nodes, tmp_path: Path
) -> None:
    script = Script(tmp_path / "script")
    script.write(1, "raise", "hold")  # a shard that has failed is not given to a second worker
    with Job(nodes, tmp_path, shards=6, node_s=HUNG_S) as job:
        job.until(lambda: len(job.attempts(1)) == 2, "it is tried again")
        worker = job.attempts(1)[1]
        os.kill(worker.process, signal.SIGKILL)  # after a SIGTERM it would wait for the held shard
        wait_until(lambda: not psutil.pid_exists(worker.process), "the worker is gone")
        script.write(1, "raise")  # with a strike for the machine it would be given up
        assert "was lost with its node" not in job.said
        os.kill(worker.raylet, signal.SIGTERM)
        job.until(lambda: "was lost with its node" in job.said, "Ray's table says that the node is gone")
        nodes.add()
        assert job.status() == 0
    assert "ended: " not in job.said, "no process is said to have crashed"


@pytest.mark.parametrize("preempted", [True, False])
def test_a_machine_that_the_autoscaler_takes_back_is_known_by_a_field_of_the_error(preempted: bool) -> None:
    reasons = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED, NodeDeathInfo.AUTOSCALER_DRAIN_IDLE
    death = NodeDeathInfo(reason=reasons[not preempted])
    error = ActorDiedError(ActorDiedErrorContext(actor_id=os.urandom(16), node_death_info=death))
    assert ray_workers._was_preempted(error) == preempted


def test_one_run_through_a_killed_actor_a_lost_node_a_poison_shard_and_a_killed_driver(
    nodes: Nodes, tmp_path: Path
) -> None:
    shards, once, poison, killed, lost, last = 64, 3, 9, 20, 33, (50, 56)
    script = Script(tmp_path / "script")
    script.write(once, "raise")
    script.write(poison, *["die"] * 99)
    for shard in (killed, lost, *last):
        script.write(shard, "hold")
    with Job(nodes, tmp_path, shards=shards) as job:
        os.kill(job.begun(killed).process, signal.SIGKILL)
        script.write(killed)
        nodes.lose(job.begun(lost).raylet)
        script.write(lost, "raise", "raise")  # with a strike for the node that was lost it would be given up
        raylet = nodes.add()
        job.until(lambda: any(one.raylet == raylet for one in script.attempts()), "the new node has a worker")
        for shard in last:
            job.begun(shard)
        job.until(lambda: f"shard {poison} is quarantined" in job.said, "the poison shard is quarantined")
        assert "was lost with its node" in job.said
        job.process.kill()
    for shard in last:
        script.write(shard)

    with Job(nodes, tmp_path, shards=shards) as job:
        assert job.status() == 3, "only what is in quarantine is missing"
    state = coverage(job.store, "fake")
    assert (state.shards_total, state.missing) == (shards, [poison])
    record = state.quarantined[poison]
    assert record["documents"] == [f"document {poison}"]
    assert len(record["errors"]) == 3
    assert all("the worker crashed" in error for error in record["errors"])
    assert job.said.splitlines()[-1].startswith(f"{state}, ")
    times = Counter(int(one.what) for one in script.attempts() if one.what != LOAD)
    assert times.pop(poison) == 3
    again = {shard: count - 1 for shard, count in times.items() if count > 1}
    assert again.keys() >= {once, killed, lost, *last}
    # Two units are in flight on a worker: that of the killed process, that of the lost node, the three of the killed
    # driver; one is next to the poison shard when it first kills; and three errors were raised. How many are assigned
    # twice at the end depends on their durations.
    twice = sum(int(number) for number in re.findall(r"(\d+) given twice", job.said))
    assert sum(again.values()) - twice <= 2 + 2 + 6 + 1 + 3

    script.write(poison)
    with Job(nodes, tmp_path, shards=shards, retry_quarantined=True) as job:
        assert job.status() == 0
    assert len(job.attempts(poison)) == 4
    assert sum(len(job.attempts(shard)) for shard in range(shards)) == times.total() + 4, "nothing else was tried"
    assert comparable(job.store) == quiet(tmp_path, shards)


@pytest.mark.parametrize("local", [True, False], ids=["local", "cluster"])
def test_a_shard_that_always_fails_is_tried_three_times_set_aside_and_named_and_all_others_are_done(
    nodes: Nodes, tmp_path: Path, local: bool
) -> None:
    shards, poison = 8, 3
    script = Script(tmp_path / "script")
    script.write(poison, *["raise"] * 99)
    with Job(nodes, tmp_path, shards=shards, local=local, workers=1) as job:
        assert job.status() == 3, "only what is in quarantine is missing"
    error = "RoutingError: shard 3 of fake: layer 0 chose as the script says"
    assert f"fake shard 3 is quarantined after 3 failures, the last one: {error}; documents: 'document 3'\n" in job.said
    state = coverage(job.store, "fake")
    assert (state.shards_total, state.missing) == (shards, [poison])
    assert state.quarantined == {poison: {"errors": [error] * 3, "documents": ["document 3"]}}
    assert {shard: len(job.attempts(shard)) for shard in range(shards)} == dict.fromkeys(range(shards), 1) | {poison: 3}
    script.write(poison)
    with Job(nodes, tmp_path, shards=shards, local=local, workers=1) as job:
        assert job.status() == 3
    assert len(job.attempts(poison)) == 3, "it stays aside"
    with Job(nodes, tmp_path, shards=shards, local=local, workers=1, retry_quarantined=True) as job:
        assert job.status() == 0
    assert "shard 3 is taken out of quarantine" in job.said
    assert len(job.attempts(poison)) == 4
    assert comparable(job.store) == quiet(tmp_path, shards)


@pytest.mark.parametrize(("workers", "failing_loads"), [(1, 2), (3, 0)])
def test_any_number_of_workers_leaves_the_bytes_of_local_also_when_a_model_fails_to_load_twice(
    nodes: Nodes, tmp_path: Path, workers: int, failing_loads: int
) -> None:
    script = Script(tmp_path / "script")
    script.write(LOAD, *["raise"] * failing_loads)
    held = range(2 * workers)  # a worker takes two shards, so that each begins one of these
    for shard in held:
        script.write(shard, "hold")
    with Job(nodes, tmp_path, workers=workers, shards=24) as job:
        job.until(lambda: sum(one.what != LOAD for one in script.attempts()) == workers, "every worker has begun")
        for shard in held:
            script.write(shard)
        assert job.status() == 0
    attempts = [job.attempts(shard) for shard in range(24)]
    again = [shard for shard in range(24) if len(attempts[shard]) > 1]
    assert len(again) <= (workers - 1) * 2, "at the tail, what waits behind another shard is given to an idle worker"
    assert not again or again[0] >= 24 - 2 * workers
    assert len({one.process for tried in attempts for one in tried}) == workers
    assert len(job.attempts(LOAD)) == workers + failing_loads
    assert comparable(job.store) == quiet(tmp_path, 24)


def only_missing(store: Path, shard: int) -> bool:
    """Whether everything is planned, and all but one shard are captured."""
    state = coverage(store, "fake")
    return state.plan.complete and state.missing == [shard]


def test_storage_that_fails_gives_no_strike_and_what_hangs_or_loses_its_device_is_replaced(
    nodes: Nodes, tmp_path: Path
) -> None:
    full, stopped, lost = 1, 6, 12
    script = Script(tmp_path / "script")
    script.write(full, "storage", "raise", "raise")
    script.write(stopped, "raise", "hold")  # a shard that has failed is not given to a second worker
    script.write(lost, "device")
    with Job(nodes, tmp_path, shards=16) as job:
        job.until(lambda: len(job.attempts(stopped)) == 2, "it is tried again")
        hung = job.attempts(stopped)[1].process
        os.kill(hung, signal.SIGSTOP)
        script.write(stopped)
        job.until(lambda: only_missing(job.store, stopped), "all others are done, and no other worker can be late")
        script.write(CLOCK, *["40"] * 20)  # it is considered hung after 600 seconds
        assert job.status() == 0
    assert "is replaced: OSError: [Errno 28] No space left on device" in job.said
    assert "is replaced: it routed no token for 600 s" in job.said
    assert "is replaced: DeviceLost: the device is gone" in job.said
    expected = {full: 4, stopped: 3, lost: 2}
    assert {shard: len(job.attempts(shard)) for shard in expected} == expected
    wait_until(lambda: not psutil.pid_exists(hung), "the process that hung is gone")
    assert comparable(job.store) == quiet(tmp_path, 16)


def test_a_worker_that_hangs_at_the_tail_holds_nobody_up(nodes: Nodes, tmp_path: Path) -> None:
    script = Script(tmp_path / "script")
    script.write(5, "hold")
    with Job(nodes, tmp_path, shards=16, stall_minutes=NEVER_S) as job:
        hung = job.begun(5).process
        os.kill(hung, signal.SIGSTOP)
        script.write(5)
        assert job.status() == 0
    assert "is replaced" not in job.said, "nobody waited until it was taken for hung"
    assert len(job.attempts(5)) == 2
    assert len({one.process for one in job.attempts(5)}) == 2
    wait_until(lambda: not psutil.pid_exists(hung), "the process that hung is gone")
    assert comparable(job.store) == quiet(tmp_path, 16)


def test_a_store_that_no_node_sees_ends_the_job_with_the_reason_and_one_that_sees_it_is_enough(
    nodes: Nodes, tmp_path: Path
) -> None:
    private = "/proc/self/cwd/routes.zarr"  # each node finds its own folder, as if it were not shared
    with Job(nodes, tmp_path, store=private, workers=1) as job:
        assert job.status() == 1
    assert job.said.splitlines()[-1].startswith("error: 3 consecutive workers failed, the last one: Misplaced: ")
    assert "Traceback" not in job.said
    refusal = f"{socket.gethostname()} cannot see the store {private} that the driver writes"
    assert f"{refusal} (it has no such capture): put the store where all nodes can read" in job.said
    assert job.attempts(LOAD) == [], "refused before a model is loaded"
    seeing = nodes.add(tmp_path)
    try:
        with Job(nodes, tmp_path, store=private, workers=4) as job:
            assert job.status() == 0
    finally:
        nodes.lose(seeing)
    assert refusal in job.said
    assert {one.raylet for one in job.script.attempts()} == {seeing}
    assert comparable(job.store) == quiet(tmp_path, 8)


def test_a_job_without_a_gpu_says_so_and_waits_until_there_is_one(nodes: Nodes, tmp_path: Path) -> None:
    script, second, held = Script(tmp_path / "script"), tmp_path / "second", range(6)
    second.mkdir()
    for shard in held:
        script.write(shard, "hold")
    with Job(nodes, tmp_path, shards=12) as first:
        at_work = lambda: {one.process for shard in held for one in first.attempts(shard)}
        first.until(lambda: len(at_work()) == 3, "its workers have all GPUs")
        with Job(nodes, second, placeless_s=2) as other:
            other.until(lambda: "no worker has a place: each needs 1 GPUs" in other.said, "it says that it waits")
            assert "the cluster has 3 GPUs" in other.said
            assert other.attempts(LOAD) == []
            for shard in held:
                script.write(shard)
            assert (first.status(), other.status()) == (0, 0)
    assert coverage(other.store, "fake").complete


def test_at_the_tail_idle_workers_are_let_go_and_the_lease_keeps_a_second_job_out_until_it_is_taken_over(
    nodes: Nodes, tmp_path: Path
) -> None:
    script = Script(tmp_path / "script")
    script.write(7, "hold")
    with Job(nodes, tmp_path) as job:
        job.begun(7)
        job.until(lambda: len(job.attempts(7)) == 2, "a second worker tries the shard that does not end")
        job.until(lambda: nodes.free_gpus() == 1, "the third one's GPU is free")
        second = tmp_path / "second"
        second.mkdir()
        with Job(nodes, second, store=str(job.store)) as other:
            assert other.status() == 1
        holder = f"process {job.process.pid} of {getpass.getuser()} on {socket.gethostname()} since "
        assert other.said.startswith(f"error: {job.store}/fake is being captured by {holder}")
        assert len(other.said.splitlines()) == 1
        record = job.store / "fake/token/lease.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "token": "of another job"}))
        assert job.status() == 1
    assert job.said.splitlines()[-1].startswith(f"error: {job.store}/fake was taken over by another job")
    assert json.loads(record.read_text())["token"] == "of another job"
    assert coverage(job.store, "fake").missing == [7]
    wait_until(lambda: nodes.free_gpus() == 3, "the job's last worker is gone")
