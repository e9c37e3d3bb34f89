"""Workers on a Ray cluster: place them, call them, and report their answers or their loss.

This module contains only what Ray adds to `jobs.capturing.loop`. Ray itself retries and restarts nothing, so that this
is decided in one place.

Ray's table of nodes shows whether a worker was lost with its node. A machine that shuts down ends its workers shortly
before its node, so a worker's end is reported when its node is gone, or after `NODE_S`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from jobs.capturing.captures import Capture
from jobs.capturing.dispatch import Unit, WorkerState
from jobs.capturing.loop import Call, CaptureLoop, Event, WorkerGone
from jobs.capturing.options import CaptureConfig
from jobs.capturing.progress import Progress
from jobs.cluster.connection import connection, runtime_env
from jobs.cluster.gauges import Metrics
from jobs.cluster.nodes import PlacedReplica, nodes_alive
from jobs.cluster.planner_thread import Planning
from jobs.console.terminal import log

if TYPE_CHECKING:
    from jobs.capturing.run import Run
    from workers.replica import Assignment

ASK_S = 2.0  # between two calls that ask a worker how many tokens it has routed
WAIT_S = 0.5
PLACELESS_S = 60.0  # arbitrary
NODE_S = 5.0  # arbitrary: a node that shuts down leaves Ray's table within a second of its workers


@contextmanager
def connected(config: CaptureConfig) -> Iterator["Cluster"]:
    """The cluster of a `connection`, for a capture."""
    with connection():
        yield Cluster(config)


class Cluster:
    """The cluster that this process is connected to.

    Parameters
    ----------
    config
        The options.
    """

    def __init__(self, config: CaptureConfig) -> None:
        self.config = config
        there = "cuda" if _resources()["GPU"] else "cpu"
        self.device = there if config.device == "auto" else config.device
        """"cuda" or "cpu": that of the workers."""

    def capture(self, run: "Run", captures: Sequence[Capture]) -> None:
        """Plan the captures and fill their missing shards on many workers: a `jobs.capturing.captures.Fill`.

        Raises
        ------
        RuntimeError
            When continuing makes no sense, or another job has taken over a capture.
        """
        assignment = run.assignment({capture.name: capture.lease.token for capture in captures})
        with Planning(captures).running() as planning, Progress(captures) as progress:
            pool = RayWorkers(self, assignment)
            CaptureLoop(pool, captures, lambda: planning.complete, [progress, Metrics()]).run()

    def most_workers(self, units: int) -> int:
        """Number of workers needed for the remaining units."""
        if self.config.workers or self.device == "cpu":
            return min(units, self.config.workers or 1)
        fit = int(_resources()["GPU"] / self.config.gpus_per_worker) if self.config.gpus_per_worker else 1
        return min(units, max(1, fit))  # at least one even without a GPU: it requests a node

    def options(self) -> dict[str, Any]:
        """Options for placing a worker."""
        return {
            "num_gpus": self.config.gpus_per_worker if self.device == "cuda" else 0,
            "num_cpus": self.config.cpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 2,  # one shard is written while the next one is computed
            "runtime_env": runtime_env(),
        }


class RayWorkers:
    """The workers of one capture, as actors: a `jobs.capturing.loop.Pool`."""

    def __init__(self, cluster: Cluster, assignment: "Assignment") -> None:
        self.cluster, self.assignment = cluster, assignment
        self.stall_s = cluster.config.stall_minutes * 60
        self.most_workers = cluster.most_workers
        self._workers: dict[int, tuple[WorkerState, Any]] = {}  # with its handle
        self._calls: dict[Any, tuple[WorkerState, Call]] = {}  # by Ray's reference to the answer
        self._nodes: dict[int, set[str]] = {}  # by worker: its node, or those on which it may be placed
        self._ended: dict[int, tuple[float, Call, RayError]] = {}  # by worker, with the time when this was seen
        self._asked = 0.0
        self._placeless_since = time.monotonic()
        self._replica = ray.remote(concurrency_groups={"ask": 1})(PlacedReplica)  # type: ignore[call-overload]

    def start(self, worker: WorkerState) -> None:
        """Start an actor and ask where it runs."""
        self._nodes[worker.number] = nodes_alive()
        self._workers[worker.number] = worker, self._replica.options(**self.cluster.options()).remote()
        self.ask(worker, "place")

    def ask(self, worker: WorkerState, call: Call) -> None:
        """Call a method of the actor."""
        _, handle = self._workers[worker.number]
        if isinstance(call, Unit):
            answer = handle.capture.remote(call.dataset, call.shard)
        elif call == "load":
            answer = handle.load.remote(self.assignment)
        else:  # answered while a shard is computed
            method = "placed" if call == "place" else call
            answer = getattr(handle, method).options(concurrency_group="ask").remote()
        self._calls[answer] = worker, call

    def stop(self, worker: WorkerState) -> None:
        """Kill the actor."""
        if worker.number in self._workers:
            _, handle = self._workers.pop(worker.number)
            self._ended.pop(worker.number, None)
            ray.kill(handle, no_restart=True)

    def listen(self, report: Callable[[Event], None]) -> None:
        """Report the answers that arrive within `WAIT_S`."""
        now = time.monotonic()
        self._ask_for_tokens(now)
        self._log_placeless(now)
        self._report_ended(now, report)
        if not self._calls:
            time.sleep(WAIT_S)
            return
        answers, _ = ray.wait(list(self._calls), num_returns=1, timeout=WAIT_S)
        answers, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0) if answers else ([], [])
        for answer in answers:
            worker, call = self._calls.pop(answer)
            if worker.number in self._workers:  # otherwise it has been stopped
                self._report(answer, worker, call, report)

    def _report(self, answer: Any, worker: WorkerState, call: Call, report: Callable[[Event], None]) -> None:
        try:
            value = ray.get(answer)
            if call == "place":
                value, node = value
                self._nodes[worker.number] = {node}
            event = Event(worker, call, value)
        except RayTaskError as error:
            event = Event(worker, call, error=error.cause if isinstance(error.cause, Exception) else error)
        except ActorUnavailableError:  # lost or only unreachable; the next answer shows which
            self.ask(worker, "place")
            return
        except RayError as error:
            self._ended.setdefault(worker.number, (time.monotonic(), call, error))
            return
        report(event)

    def _report_ended(self, now: float, report: Callable[[Event], None]) -> None:
        """Report the workers that have ended, once it is known whether their nodes have ended too."""
        there = nodes_alive() if self._ended else set()
        for number, (since, call, error) in list(self._ended.items()):
            with_node = not self._nodes[number] <= there or _was_preempted(error)
            if with_node or now - since >= NODE_S:
                del self._ended[number]
                report(Event(self._workers[number][0], call, error=WorkerGone(_reason(error), with_node=with_node)))

    def _ask_for_tokens(self, now: float) -> None:
        """Periodically ask every worker how many tokens it has routed."""
        if now - self._asked < ASK_S:
            return
        self._asked = now
        for worker, _ in self._workers.values():
            if worker.stage == "ready" and (worker, "routed") not in self._calls.values():
                self.ask(worker, "routed")

    def _log_placeless(self, now: float) -> None:
        """Periodically log that no worker has a place."""
        workers = [worker for worker, _ in self._workers.values()]
        if not workers or any(worker.stage != "waiting" for worker in workers):
            self._placeless_since = now
        elif now - self._placeless_since >= PLACELESS_S:
            self._placeless_since = now
            options, there = self.cluster.options(), _resources()
            log(
                f"no worker has a place: each needs {options['num_gpus']:g} GPUs and {options['num_cpus']:g} CPUs;"
                f" the cluster has {there['GPU']:g} GPUs and {there['CPU']:g} CPUs in total, some maybe in use"
            )


def _reason(error: RayError) -> str:
    """Ray's description of a worker's end, for people."""
    text = " ".join(str(error).split())
    return text.partition("Worker exit detail: ")[2] or text  # internal numbers of Ray come before it


def _was_preempted(error: RayError) -> bool:
    """Whether Ray's autoscaler has removed the machine."""
    return isinstance(error, RayActorError) and error.preempted


def _resources() -> dict[str, float]:
    """The resources of all current nodes, in use or not."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {"GPU": 0.0, "CPU": 0.0, **resources}
