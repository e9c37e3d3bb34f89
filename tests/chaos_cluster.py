"""One long capture through all faults of a cluster: a part of `make chaos`.

240 shards on three nodes. A model that fails to load twice, workers ten times slower, a shard that raises once, one
that always raises and one that always kills its process, workers killed in the middle of a shard, one that hangs, a
node that is lost and one that is added, and the driver killed and started again. The result is compared with an
undisturbed run, byte for byte. `tests/jobs/test_ray_workers.py` is the short form.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faulty_model import LOAD, Script
from ray_nodes import ray_nodes
from test_ray_workers import Job, comparable, quiet

from store import coverage

HERE = Path(__file__).parent
SHARDS, SECONDS, STALL_MINUTES = 240, 0.25, 0.2
ONCE, KILLER, RAISER, KILLED, HUNG, LOST, LAST = 10, 30, 50, (70, 100), 130, 160, 210


def chaos(folder: Path) -> list[dict[str, Any]]:
    """Run it, and report for each fault how often it was injected and survived, and what it cost."""
    script = Script(folder / "script")
    script.write(LOAD, "raise", "raise", "slow")
    script.write(ONCE, "raise")
    script.write(KILLER, *["die"] * 99)
    script.write(RAISER, *["raise"] * 99)
    for shard in (*KILLED, HUNG, LOST, LAST):
        script.write(shard, "hold")
    with ray_nodes(3, HERE) as nodes:
        options: dict[str, Any] = {"shards": SHARDS, "seconds": SECONDS, "stall_minutes": STALL_MINUTES}
        with Job(nodes, folder, **options) as job:
            for shard in KILLED:
                os.kill(job.begun(shard).process, signal.SIGKILL)
                script.write(shard)
            os.kill(job.begun(HUNG).process, signal.SIGSTOP)
            script.write(HUNG)
            nodes.lose(job.begun(LOST).raylet)
            script.write(LOST)
            added = nodes.add()
            job.until(lambda: any(one.raylet == added for one in script.attempts()), "the new node has a worker")
            job.begun(LAST)
            job.process.kill()
            first = job.said
        script.write(LAST)
        script.write(LOAD, "slow")  # also at the end
        with Job(nodes, folder, **options) as job:
            status, second = job.status(), job.said
    return told(folder, script, status, [first, second])


def told(folder: Path, script: Script, status: int, said: Sequence[str]) -> list[dict[str, Any]]:
    """Compare the result with an undisturbed run; returns the rows of the table."""
    store = folder / "routes.zarr"
    state, poison = coverage(store, "fake"), {KILLER, RAISER}
    assert status == 3, "only what is in quarantine is missing"
    assert (state.shards_total, set(state.missing), set(state.quarantined)) == (SHARDS, poison, poison)
    for shard in poison:
        record = state.quarantined[shard]
        assert record["documents"] == [f"document {shard}"]
        assert len(record["errors"]) == 3
    assert all("the worker crashed" in error for error in state.quarantined[KILLER]["errors"])
    assert all("RoutingError" in error for error in state.quarantined[RAISER]["errors"])
    command = [sys.executable, str(HERE.parent / "jobs" / "status.py"), str(store), "--verify", "--json"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)["data_sets"][0]
    assert found["holds"], "everything that is committed is read back"
    again = {shard: times(script, shard) for shard in range(SHARDS) if len(times(script, shard)) > 1}
    twice = sum(int(number) for number in re.findall(r"(\d+) given twice$", "\n".join(said), re.MULTILINE))
    rest = sum(len(attempts) - 1 for shard, attempts in again.items() if shard not in poison)
    # Two shards are in flight on a worker: of two killed, one hung, one lost, two next to the poison, three of a
    # driver.
    bound = 2 * (len(KILLED) + 1 + 1 + 2 + 3) + 1 + 2
    assert rest - twice <= bound, f"{rest} shards were computed again, {twice} of them at the tail; {bound} in flight"
    script.write(KILLER)
    script.write(RAISER)
    same_bytes(folder, store)
    ended = set(range(SHARDS)) - set(state.missing) | (set(state.quarantined) & poison)
    rows = [
        row("a worker killed with SIGKILL in a shard", 2, again, KILLED, ended),
        row("a worker that hangs", 1, again, [HUNG], ended),
        row("a node lost", 1, again, [LOST], ended),
        row("the driver killed and started again", 1, again, [LAST], ended),
        row("a shard that raises once", 1, again, [ONCE], ended),
        row("a shard that always kills its process: quarantined", 3, again, [KILLER], ended),
        row("a shard that always raises: quarantined", 3, again, [RAISER], ended),
        row("a node added", 1, again, [], ended),
        row("a model that fails to load", 2, again, [], ended),
        row("a worker ten times slower", 2, again, [], ended),
        {"what": "given to two workers at the tail", "times": twice, "survived": twice, "computed again": twice},
    ]
    return [*rows, {"what": f"computed again in all; {bound} were in flight", "times": rest, "survived": rest}]


def same_bytes(folder: Path, store: Path) -> None:
    """Committed shards have the bytes of an undisturbed run; quarantined ones are missing."""
    quarantined = (f"/{shard}.json" for shard in (KILLER, RAISER))
    left_out = [f"/c/{shard}/" for shard in (KILLER, RAISER)], tuple(quarantined)
    both = []
    for files in (comparable(store), quiet(folder, SHARDS)):
        routes = ("fake/expert/", "fake/weight/")
        both.append(
            {
                key: data
                for key, data in files.items()
                if not (key.startswith(routes) and any(part in key for part in left_out[0]))
                and not key.endswith(left_out[1])
            }
        )
    assert both[0] == both[1]


def times(script: Script, shard: int) -> list[float]:
    """All times at which a shard was started."""
    return [one.at for one in script.attempts() if one.what == str(shard)]


def row(
    what: str, number: int, again: dict[int, list[float]], shards: Sequence[int], ended: set[int]
) -> dict[str, Any]:
    """A fault's row: whether the affected shards ended as they must, and the seconds until one of them was started
    again."""
    lost = [attempts[1] - attempts[0] for shard in shards if (attempts := again.get(shard))]
    return {
        "what": what,
        "times": number,
        "survived": number if ended.issuperset(shards or range(SHARDS)) else 0,
        "computed again": sum(len(again.get(shard, [0])) - 1 for shard in shards) if shards else None,
        "seconds": round(max(lost), 1) if lost else None,
    }
