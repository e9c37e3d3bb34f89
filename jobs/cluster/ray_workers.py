"""Capture on a Ray cluster: places the workers, hands them shards, and tells the dispatcher what became of them.

The rules are in `jobs.cluster.dispatch`, the work in `workers.replica`; here is only what Ray adds. Ray itself retries
and restarts nothing, so that there is one place where that is decided.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from jobs.capturing.captures import Capture
from jobs.capturing.options import CaptureConfig
from jobs.cluster.connection import connection, runtime_env
from jobs.cluster.dispatch import Dispatcher, Unit, WorkerState
from jobs.cluster.planner_thread import Planning
from jobs.cluster.progress import Progress
from jobs.console.terminal import say
from store.secrets import without_secrets
from store.verification import verify_shard
from workers.replica import Misplaced, Replica
from workers.shard import DeviceLost

if TYPE_CHECKING:
    from jobs.capturing.run import Run
    from workers.replica import Assignment

ASK_S = 2.0  # between two questions to a worker how many tokens it has routed
WAIT_S = 0.5
PLACELESS_S = 60.0  # arbitrary

Call = Unit | str
"""What was asked of a worker: a unit, or one of its methods."""


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
            When going on makes no sense, or another job has taken a capture over.
        """
        assignment = run.assignment({capture.name: capture.lease.token for capture in captures})
        with Planning(captures).running() as planning, Progress(captures) as progress:
            _Dispatch(self, assignment, captures, planning, progress).run()

    def most_workers(self, units: int) -> int:
        """Workers wanted while so many units are left."""
        if self.config.workers or self.device == "cpu":
            return min(units, self.config.workers or 1)
        fit = int(_resources()["GPU"] / self.config.gpus_per_worker) if self.config.gpus_per_worker else 1
        return min(units, max(1, fit))  # one also where there is no GPU: it asks for a node to come

    def options(self) -> dict[str, Any]:
        """How a worker is placed."""
        return {
            "num_gpus": self.config.gpus_per_worker if self.device == "cuda" else 0,
            "num_cpus": self.config.cpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 2,  # one shard is written while the next one is computed
            "runtime_env": runtime_env(),
        }


class _Dispatch:
    """One capture: the dispatcher, the workers' handles, and the calls that are under way."""

    def __init__(
        self,
        cluster: Cluster,
        assignment: "Assignment",
        captures: Sequence[Capture],
        planning: Planning,
        progress: Progress,
    ) -> None:
        self.cluster, self.assignment, self.planning, self.progress = cluster, assignment, planning, progress
        self.captures = {capture.name: capture for capture in captures}
        self.dispatcher = Dispatcher(
            cluster.most_workers,
            lambda unit: self.captures[unit.dataset].group.committed(unit.shard),
            self._quarantine,
            stall_s=cluster.config.stall_minutes * 60,
        )
        self._handles: dict[int, Any] = {}
        self._calls: dict[Any, tuple[WorkerState, Call]] = {}
        self._added = dict.fromkeys(self.captures, 0)
        self._asked = 0.0
        self._placeless_since = time.monotonic()
        self._replica = ray.remote(concurrency_groups={"ask": 1})(Replica)  # type: ignore[call-overload]

    def run(self) -> None:
        """Until nothing is left to do."""
        try:
            looked = time.monotonic()
            while not self.dispatcher.finished:
                if time.monotonic() - looked > self.dispatcher.stall_s / 2:
                    self.dispatcher.stood_still(time.monotonic())
                looked = time.monotonic()
                self._take_planned()
                self._act(looked)
                self._say_waiting(looked)
                self._listen(time.monotonic())
                self.progress.show(self.dispatcher)
                self._stop_if_senseless()
        finally:
            for number in list(self._handles):
                self._kill(number)
        for unit in sorted(self.dispatcher.copied):  # two that computed otherwise, one with less memory, may have met
            if reason := verify_shard(self.captures[unit.dataset].group, unit.shard):
                say(f"{unit} was written by two workers, and does not hold: {reason}; the same command does it again")

    def _take_planned(self) -> None:
        complete = self.planning.complete  # asked first: what is planned after it is taken the next time
        for name, capture in self.captures.items():
            planned = capture.planned_shards  # asked once: it grows
            self.dispatcher.add(Unit(name, shard) for shard in capture.missing(self._added[name], planned))
            self._added[name] = planned
        self.dispatcher.all_added = complete

    def _act(self, now: float) -> None:
        for worker, reason in self.dispatcher.stalled(now):
            self._kill(worker.number)
            say(f"worker {worker.number} on {worker.host} is replaced: {reason}")
            self.dispatcher.died(worker, reason, now)
        for worker, unit in self.dispatcher.assign(now):
            self._call(worker, unit)
        for worker in self.dispatcher.surplus():
            self._kill(worker.number)
        for worker in self.dispatcher.start(now):
            self._handles[worker.number] = self._replica.options(**self.cluster.options()).remote()
            self._call(worker, "place")
        if now - self._asked >= ASK_S:
            self._asked = now
            for worker in self.dispatcher.workers.values():
                if worker.stage == "ready" and (worker, "routed") not in self._calls.values():
                    self._call(worker, "routed")

    def _call(self, worker: WorkerState, call: Call) -> None:
        handle = self._handles[worker.number]
        if isinstance(call, Unit):
            answer = handle.capture.remote(call.dataset, call.shard)
        elif call == "load":
            answer = handle.load.remote(self.assignment)
        else:  # answered beside a shard in work
            answer = getattr(handle, call).options(concurrency_group="ask").remote()
        self._calls[answer] = worker, call

    def _listen(self, now: float) -> None:
        if not self._calls:
            time.sleep(WAIT_S)
            return
        answers, _ = ray.wait(list(self._calls), num_returns=1, timeout=WAIT_S)
        answers, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0) if answers else ([], [])
        for answer in answers:
            worker, call = self._calls.pop(answer)
            if worker.number in self.dispatcher.workers:  # else what it says is of no use any more
                self._hear(answer, worker, call, now)

    def _hear(self, answer: Any, worker: WorkerState, call: Call, now: float) -> None:
        try:
            value = ray.get(answer)
        except RayTaskError as error:
            self._raised(worker, call, error, now)
        except ActorUnavailableError:  # lost or only out of reach: the next answer says
            self._call(worker, "place")
        except RayError as error:
            self._gone(worker, error, now)
        else:
            self._answered(worker, call, value, now)

    def _answered(self, worker: WorkerState, call: Call, value: Any, now: float) -> None:
        if isinstance(call, Unit):
            if self.dispatcher.finish(worker, call, now):
                self.progress.finished(worker, call, value)
        elif call == "routed":
            self.dispatcher.routed(worker, value, now)
        elif call == "load":
            self.dispatcher.ready(worker, now)
        elif worker.stage == "waiting":
            self.dispatcher.placed(worker, value, now)
            self._call(worker, "load")
        else:  # it was out of reach, and what it was asked before is lost
            self._kill(worker.number)
            self.dispatcher.lost(worker)

    def _raised(self, worker: WorkerState, call: Call, error: RayTaskError, now: float) -> None:
        cause = error.cause if isinstance(error.cause, Exception) else error
        reason = f"{type(cause).__name__}: {cause}"
        if isinstance(call, Unit) and not isinstance(cause, OSError | DeviceLost):
            say(f"{call} failed on worker {worker.number}, {worker.host}: {reason}")
            self.dispatcher.fail(worker, call, reason, now)
            return
        self._kill(worker.number)
        say(f"worker {worker.number} on {worker.host} is replaced: {reason}")
        if isinstance(cause, DeviceLost):
            self.dispatcher.died(worker, reason, now)
        elif isinstance(cause, Misplaced):
            self.dispatcher.refused(worker, reason, now)
        else:
            self.dispatcher.broke(worker, reason, now)

    def _gone(self, worker: WorkerState, error: RayError, now: float) -> None:
        self._kill(worker.number)
        reason = " ".join(str(error).split())
        reason = reason.partition("Worker exit detail: ")[2] or reason  # before it stand numbers of Ray's own
        if lost_with_node(error):
            say(f"worker {worker.number} was lost with its node {worker.host}")
            self.dispatcher.lost(worker)
        else:
            say(f"worker {worker.number} on {worker.host or 'its node'} ended: {reason}")
            self.dispatcher.died(worker, reason, now)

    def _quarantine(self, unit: Unit, errors: list[str]) -> None:
        group = self.captures[unit.dataset].group
        names = group.document_names(unit.shard)
        group.quarantine(unit.shard, {"errors": list(map(without_secrets, errors)), "documents": names})
        say(f"{unit} is given up after {len(errors)} failures, the last one: {errors[-1]}; documents: {_few(names)}")

    def _say_waiting(self, now: float) -> None:
        """Say now and then that no worker has a place."""
        workers = self.dispatcher.workers.values()
        if not workers or any(worker.stage != "waiting" for worker in workers):
            self._placeless_since = now
        elif now - self._placeless_since >= PLACELESS_S:
            self._placeless_since = now
            options, there = self.cluster.options(), _resources()
            say(
                f"no worker has a place: each needs {options['num_gpus']:g} GPUs and {options['num_cpus']:g} CPUs;"
                f" the cluster has {there['GPU']:g} GPUs and {there['CPU']:g} CPUs in all, some perhaps in use"
            )

    def _kill(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if handle is not None:
            ray.kill(handle, no_restart=True)

    def _stop_if_senseless(self) -> None:
        for capture in self.captures.values():
            capture.check_lease()
        if self.dispatcher.hopeless:
            raise self.dispatcher.despair


def lost_with_node(error: RayError) -> bool:
    """Whether a worker went because its machine did; spot machines shut down in order, with a SIGTERM."""
    signs = ("its node has died", "receives a SIGTERM")
    told = " ".join(str(error).split())  # whatever its line breaks
    return isinstance(error, RayActorError) and (error.preempted or any(sign in told for sign in signs))


def _resources() -> dict[str, float]:
    """What all nodes have that are there now, in use or not."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {"GPU": 0.0, "CPU": 0.0, **resources}


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + f" and {len(names) - 3:,} more" * (len(names) > 3)
