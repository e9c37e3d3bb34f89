"""One copy of the model, and the shards that it fills: what every worker is, in this process or on another machine.

It promises not to compute a single shard before it has proved that it sees the driver's store, that its packages and
device are those that the captures were begun with, and that its model is the one that their identities name. It does
not know who calls it: `jobs.capturing.local` does in this process, `jobs.cluster.ray_workers` over Ray.
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
    """This machine cannot do the work as it is: another store, another environment, another model."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a replica is to do; it travels to other machines."""

    store: str
    leases: Mapping[str, str]
    """Data set to the token of the driver's lease on it: who reads the same token sees the same store."""
    make_engine: Callable[[], Engine]
    device: str
    """"cuda" or "cpu"."""
    batch_tokens: int
    """Padded tokens in a micro-batch at most."""
    given: GivenRoutes | None = None
    """Where routers take their choices from, instead of choosing."""
    allow_mixed: bool = False
    """Take part also with other package versions, or another device, than the capture was begun with."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables that no log shows, such as HF_TOKEN."""


class Replica:
    """A worker.

    Parameters
    ----------
    progress
        Called with the number of tokens of each micro-batch that was begun.
    """

    def __init__(self, progress: Callable[[int], None] = lambda tokens: None) -> None:
        self._progress = progress
        self._routed_tokens = 0
        self._computing, self._writing = threading.Lock(), threading.Lock()

    def place(self) -> str:
        """The host that this runs on."""
        return socket.gethostname()

    def load(self, assignment: Assignment) -> dict[str, str]:
        """Prove that the work can be done here, and load the model; returns the environment.

        Raises
        ------
        Misplaced
            When the store, the environment or the model is not the one that is meant; it says what to do.
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
        """Route one shard; what is returned commits it, and gives its tokens, seconds and halvings.

        What is returned must be called, in any thread; it may be while the next shard is computed. Two shards are in
        memory at most: no third one is computed before the first is written.

        Raises
        ------
        RoutingError, OutOfMemory, DeviceLost
            See `workers.shard.capture_shard`.
        OSError
            When the store cannot be read; from what is returned, when it cannot be written.
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
        """`compute` and commit; two threads may call this: one shard is written while the next one is computed."""
        return self.compute(dataset, shard)()

    def routed(self) -> int:
        """Tokens routed so far, of shards in work too: it grows as long as this lives."""
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
            what = "it has no such capture" if found is None else "another job's lease lies there"
            raise Misplaced(
                f"{host} does not see the store {path} that the driver writes ({what}): put the store where all"
                " nodes see it, such as a shared file system or s3://"
            )
        return CaptureGroup(path, name)

    def _refuse_other_routes(self, given: GivenRoutes) -> None:
        """Another capture may lie at the same path here, of the same tokens."""
        host, place = socket.gethostname(), f"{given.path}/{given.dataset}"
        advice = "put the store of --routes_from where all nodes see it, such as a shared file system or s3://"
        try:
            found = given.identity
        except OSError as error:
            raise Misplaced(f"{host} cannot read {place}, which gives the choices ({error}): {advice}") from error
        for group in self._groups.values():
            if (wanted := group.identity.get("routes_from")) != found:
                raise Misplaced(
                    f"{place} is another capture on {host} than the one that gives the choices of {group.dataset}: its"
                    f" identity is {found}, and {wanted} is wanted: {advice}"
                )

    def _refuse_other(self, group: CaptureGroup, begun: Mapping[str, str], here: Mapping[str, str]) -> None:
        begun, here = ({name: side.get(name, "") for name in SAME_BYTES_NEEDS} for side in (begun, here))
        if (lines := differences(begun, here)) and not self._assignment.allow_mixed:
            raise Misplaced(
                f"{group.path}/{group.dataset} was begun in another environment than that of {socket.gethostname()},"
                " so that its shards would not be comparable to the bit:\n  "
                + "\n  ".join(lines)
                + "\nrestore it, or accept this with --allow_mixed"
            )
