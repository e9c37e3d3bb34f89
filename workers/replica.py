"""One copy of the model and the shards that it fills. Every worker is one, in this process or on another machine.

It computes no shard before it has proved that it can read the driver's store, that its packages and device are those
with which the captures were started, and that its model is the one that their identities name. It does not know its
caller: `jobs.capturing.local` calls it in this process, `jobs.cluster.ray_workers` through Ray.
"""

import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from store.group import CaptureGroup
from store.identity import LATER, differences
from store.lease import lease_token
from workers.environment import SAME_BYTES_NEEDS, environment
from workers.given import GivenRoutes
from workers.shard import ROUTING_VERSION, Engine, capture_shard


class Misplaced(ValueError):
    """This machine cannot do the work in its present state: its store, environment or model differs."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The work of a replica; it is sent to other machines."""

    store: str
    leases: Mapping[str, str]
    """Maps each data set to the token of the driver's lease on it. A worker that reads the same token uses the same
    store."""
    make_engine: Callable[[], Engine]
    device: str
    """"cuda" or "cpu"."""
    batch_tokens: int
    """Maximum number of tokens in a micro-batch, padding included."""
    given: GivenRoutes | None = None
    """The routes that routers use instead of choosing."""
    allow_mixed: bool = False
    """Accept package versions and a device other than those with which the capture was started."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables that are never logged, such as HF_TOKEN."""


class Replica:
    """A worker.

    Parameters
    ----------
    progress
        Called with the number of tokens of each micro-batch when it starts.
    """

    def __init__(self, progress: Callable[[int], None] = lambda tokens: None) -> None:
        self._progress = progress
        self._routed_tokens = 0
        self._computing, self._writing = threading.Lock(), threading.Lock()

    def place(self) -> str:
        """The name of this host."""
        return socket.gethostname()

    def load(self, assignment: Assignment) -> dict[str, str]:
        """Prove that the work can be done here and load the model; returns the environment.

        Raises
        ------
        Misplaced
            When the store, the environment or the model is not the expected one; the message says what to do.
        """
        os.environ.update(assignment.secrets)
        self._assignment = assignment
        self._groups = {name: self._open(name, token) for name, token in assignment.leases.items()}
        if assignment.given is not None:
            self._refuse_other_routes(assignment.given)
        here = environment(assignment.device)
        for group in self._groups.values():
            self._refuse_other(group, group.environment or here, here)
        self._engine = assignment.make_engine()
        for group in self._groups.values():
            known = {name: value for name, value in self._engine.description.items() if name in group.identity | LATER}
            known |= {"routing_version": ROUTING_VERSION}
            begun = {name: group.identity[name] for name in known if name in group.identity}
            if lines := differences(begun, known):
                raise Misplaced(
                    f"the model on {socket.gethostname()} is not the captured one:\n  " + "\n  ".join(lines)
                )
            self._refuse_other(group, group.settle_environment(here), here)
        self._facts = {"worker": f"{socket.gethostname()}:{os.getpid()}", "versions": here}
        return here

    def compute(self, dataset: str, shard: int) -> Callable[[], dict[str, Any]]:
        """Route one shard; the returned function commits it and returns its tokens, seconds and halvings.

        The returned function must be called, in any thread, possibly while the next shard is computed. At most two
        shards are in memory: a third one is not computed before the first is written.

        Raises
        ------
        RoutingError, OutOfMemory, DeviceLost
            See `workers.shard.capture_shard`.
        OSError
            When the store cannot be read; from the returned function, when it cannot be written.
        """
        group = self._groups[dataset]
        with self._computing:
            rows = group.read_rows(shard)
            source = self._assignment.given
            finish = capture_shard(
                group,
                shard,
                rows,
                self._engine,
                batch_tokens=self._assignment.batch_tokens,
                progress=self._count,
                given=None if source is None else source.of(shard, rows),
            )
            self._writing.acquire()

        def commit() -> dict[str, Any]:
            try:
                routes, own = finish()
                group.commit(shard, routes, rows=rows, facts={**self._facts, **own})
            finally:
                self._writing.release()
            return {"tokens": int(rows.length.sum()), **own}

        return commit

    def capture(self, dataset: str, shard: int) -> dict[str, Any]:
        """Call `compute` and commit. Two threads may call this, so that one shard is written while the next one is
        computed."""
        return self.compute(dataset, shard)()

    def routed(self) -> int:
        """Number of tokens routed so far, including those of unfinished shards. It only grows."""
        return self._routed_tokens

    def _count(self, tokens: int) -> None:
        self._routed_tokens += tokens
        self._progress(tokens)

    def _open(self, name: str, token: str) -> CaptureGroup:
        path, host = self._assignment.store, socket.gethostname()
        try:
            found = lease_token(CaptureGroup(path, name))
        except OSError as error:
            raise Misplaced(f"{host} cannot read the store {path}: {error}") from error
        if found != token:
            what = "it has no such capture" if found is None else "it holds the lease of another job"
            raise Misplaced(
                f"{host} cannot see the store {path} that the driver writes ({what}): put the store where all"
                " nodes can read and write it, such as a shared file system or s3://"
            )
        return CaptureGroup(path, name)

    def _refuse_other_routes(self, given: GivenRoutes) -> None:
        """Check that the same path holds the same capture here; it may hold another capture of the same tokens."""
        host, place = socket.gethostname(), f"{given.path}/{given.dataset}"
        advice = "put the store of --routes_from where all nodes can read it, such as a shared file system or s3://"
        try:
            found = given.identity
        except OSError as error:
            raise Misplaced(f"{host} cannot read {place}, which gives the choices ({error}): {advice}") from error
        for group in self._groups.values():
            if (wanted := group.identity.get("routes_from")) != found:
                raise Misplaced(
                    f"{place} on {host} is not the capture that gives the choices of {group.dataset}: its"
                    f" identity is {found}, but {wanted} is needed: {advice}"
                )

    def _refuse_other(self, group: CaptureGroup, begun: Mapping[str, str], here: Mapping[str, str]) -> None:
        begun, here = ({name: side.get(name, "") for name in SAME_BYTES_NEEDS} for side in (begun, here))
        if (lines := differences(begun, here)) and not self._assignment.allow_mixed:
            raise Misplaced(
                f"{group.path}/{group.dataset} was started in another environment than that of {socket.gethostname()},"
                " so its shards would not be bit-identical:\n  "
                + "\n  ".join(lines)
                + "\nrestore that environment, or accept the difference with --allow_mixed"
            )
