"""A Ray cluster of several nodes on this machine with fake GPUs: nodes are added and lost while it runs.

`ray.cluster_utils.Cluster` runs in its own process, so that nothing of Ray remains in the tests' process. Its files are
in their own folder, and only the processes that it started are stopped.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil
from ray_head import NODE, PATIENT

HEALTH = {  # a node counts as lost 1.5 s after its raylet stopped listening, not 30 s; a slow node does not
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


class Nodes:
    """The cluster, and the environment of a process that uses it.

    Parameters
    ----------
    process
        The process of this file's `serve`.
    environment
        Of a driver; RAY_ADDRESS is set.
    """

    popen = staticmethod(subprocess.Popen)
    """How a driver is started."""

    def __init__(self, process: "subprocess.Popen[str]", environment: dict[str, str]) -> None:
        self._process = process
        address = self._ask("start")
        self.environment = {**environment, "RAY_ADDRESS": address}

    def add(self, folder: Path | None = None) -> int:
        """Start a node with one CPU and one GPU in a folder, and return the process id of its raylet."""
        return int(self._ask("add", str(folder or "/")))

    def lose(self, raylet: int) -> None:
        """Lose a node as if its machine were switched off."""
        self._ask("lose", raylet)

    def free_gpus(self) -> float:
        """GPUs that no worker holds."""
        return float(self._ask("free"))

    def _ask(self, *question: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def ray_nodes(count: int, *paths: Path) -> Iterator[Nodes]:
    """A cluster with a head without a GPU and a number of nodes with one GPU each.

    Parameters
    ----------
    paths
        Folders in which a worker finds further modules.
    """
    folder = Path(tempfile.mkdtemp(prefix="ea", dir="/tmp"))  # short: a socket's path has 107 characters
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",  # its ports are open to other users of the machine
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        **PATIENT,
        **HEALTH,
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, start_new_session=True,
        )  # fmt: skip
    try:
        nodes = Nodes(process, environment)
        for _ in range(count):
            nodes.add()
        yield nodes
    finally:
        process.kill()
        process.communicate()
        _end_all_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _end_all_of(folder: Path) -> None:
    """End the processes whose Ray files are in a folder: workers outlive their node for a while."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(folder):
                process.kill()
        except psutil.Error:  # gone meanwhile, or another user's
            continue


def serve(questions: IO[str], answers: IO[str]) -> None:
    """Answer each input line with a line."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    nodes: dict[int, Any] = {}
    add = partial(cluster.add_node, num_cpus=1, node_ip_address=NODE)

    def answer(what: str, *given: Any) -> Any:
        match what:
            case "start":
                add(include_dashboard=False, dashboard_agent_listen_port=0)
                return cluster.address
            case "add":
                os.chdir(given[0])  # the node's folder is that of the process that starts it
                node = add(num_gpus=1)
                raylet = node.all_processes["raylet"][0].process.pid
                nodes[raylet] = node
                return raylet
            case "lose":
                workers = psutil.Process(given[0]).children(recursive=True)
                cluster.remove_node(nodes.pop(given[0]), allow_graceful=False)
                for worker in workers:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
            case "free":
                there = cluster.global_state.available_resources_per_node()
                return sum(node.get("GPU", 0.0) for node in there.values())
        return None

    for question in questions:
        answers.write(json.dumps(answer(*json.loads(question))) + "\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answers:  # what Ray prints goes elsewhere
        os.dup2(2, 1)
        serve(sys.stdin, answers)
