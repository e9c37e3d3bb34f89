"""Every interleaving of capture, crash, resume, damage, verify, heal, a second writer and a zombie's late writes.

A state machine for Hypothesis. After every step the law of `law` must hold. At the end all stopped processes continue,
and then two verifications, each followed by a capture, must leave the clean run's store.

A zombie is a process that others may consider dead: it stops between any two of its steps and continues after they have
taken over. Unlike a real process, which notices within twenty seconds, it never notices. It may stop during a put
before it gets the answer, and retry that put when a second driver has its lease.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from law import LEASE, PARTIAL, ROUTES, Files, Law, committed, differing, held_record
from simulated import NAME, STORE, Killed, Process, capture, simulation

from jobs.capturing.captures import Capture, Fill
from jobs.capturing.local import capture_here
from store import CaptureGroup, coverage
from store.objects import Objects
from store.verification import Findings, verify
from workers.replica import Misplaced, Replica

ACTS = st.integers(0, 14) | st.integers(0, 80)  # a resumed capture has few acts, a first one 75
STEPS = st.integers(0, 40) | st.integers(0, 150)
SHARD = st.integers(0, 4)
DAMAGE: dict[str, Callable[[bytes, int], bytes | None]] = {
    "gone": lambda data, at: None,
    "emptied": lambda data, at: b"",
    "cut": lambda data, at: data[: at % len(data)],
    "a bit flipped": lambda data, at: _flipped(data, at),
}
OVERTAKEN = (Killed, RuntimeError, OSError, Misplaced, AssertionError)
"""How a zombie may end. One of this project's own assertions fails if the plan changed between two reads."""


class Interleavings(RuleBasedStateMachine):
    """The state machine, over any objects.

    Parameters
    ----------
    make
        Makes the store's objects from a scratch key; the store is empty.
    snapshot, clean
        See `law.Law`.
    """

    def __init__(self, make: Callable[[str], Objects], snapshot: Callable[[], Files], clean: Files) -> None:
        super().__init__()
        self.objects, self.law = make(PARTIAL), Law(snapshot, clean)
        self.zombies: list[Process] = []
        self.bereft: list[Process] = []
        """Zombies whose folder was removed while they were stopped."""
        self.simulation = simulation(make)
        self.simulation.__enter__()

    @invariant()
    def the_store_equals_the_clean_run_or_says_what_is_missing(self) -> None:
        state = self.law.state()
        self.law.plan_hurt |= bool(
            state and state.lost and self.bereft
        )  # the process that created a group has lost a part of it
        self.law.holds()

    # One process at a time

    @rule(dies_at=st.none() | ACTS, retry=st.booleans())
    def capture(self, dies_at: int | None, retry: bool) -> None:
        """Capture, resume or repair; killed or not."""
        self.run(Process(dies_at=dies_at), lambda: capture(retry_quarantined=retry))

    @rule(shards=st.lists(SHARD, unique=True), dies_at=st.none() | ACTS)
    def capture_some(self, shards: list[int], dies_at: int | None) -> None:
        """A job that ends before it has done everything."""
        self.run(Process(dies_at=dies_at), lambda: capture(_fill_some(shards)))

    @rule(fails_at=ACTS)
    def capture_while_the_storage_fails_once(self, fails_at: int) -> None:
        """The job ends by itself and says why."""
        self.run(Process(fails_at=fails_at), capture)

    @rule(loses_at=ACTS, gives_up=st.booleans())
    def capture_while_an_answer_is_lost(self, loses_at: int, gives_up: bool) -> None:
        """A put takes effect but its answer is lost: the client retries, or gives up and the job ends."""
        self.run(Process(loses_at=loses_at, gives_up=gives_up), capture)

    def run(self, process: Process, work: Callable[[], object]) -> None:
        """Run a job; it must succeed if nothing prevents it."""
        holder = json.loads(self.law.snapshot().get(LEASE, b"{}")).get("process")
        held = any(zombie.number == holder and not zombie.seems_dead for zombie in self.zombies)
        before = self.law.snapshot()
        error = process.run(work)
        if held:
            assert isinstance(error, Killed | OSError) or "is being captured by" in str(error), error
            assert differing(self.law.snapshot(), before) == []
        elif self.law.plan_hurt and isinstance(error, ValueError):
            assert "remove the folder" in str(error) or "is not JSON" in str(error), error
        elif process.dead:
            assert isinstance(error, Killed), error
        elif process.storage_failed:
            left = error is None and LEASE in self.law.snapshot()  # it failed when only that was left to do
            assert left or "No space left on device" in str(error), error
        else:
            assert error is None, error

    # Zombies

    @precondition(lambda self: len(self.zombies) < 2)
    @rule(stops_at=STEPS, shards=st.none() | st.lists(SHARD, unique=True), verifies=st.booleans())
    def stand_still(self, stops_at: int, shards: list[int] | None, verifies: bool) -> None:
        """Start a process that stops before one of its steps."""
        zombie, fill = Process(stops_at=stops_at), capture_here if shards is None else _fill_some(shards)
        if zombie.start((lambda: verify(CaptureGroup(STORE, NAME))) if verifies else (lambda: capture(fill))):
            self.zombies.append(zombie)

    @precondition(lambda self: not all(zombie.seems_dead for zombie in self.zombies))
    @rule(which=st.integers(0, 1))
    def be_taken_for_dead(self, which: int) -> None:
        """Its lease is not renewed for two minutes."""
        self.zombies[which % len(self.zombies)].seems_dead = True

    @precondition(lambda self: self.zombies)
    @rule(which=st.integers(0, 1), steps=st.none() | STEPS, acts=st.none() | ACTS)
    def go_on(self, which: int, steps: int | None, acts: int | None) -> None:
        """Let a zombie continue: to its end, for some steps, or until it dies."""
        zombie = self.zombies.pop(which % len(self.zombies))
        if zombie.go_on(steps=steps, acts=acts):
            self.zombies.append(zombie)
        else:
            expected = (*OVERTAKEN, ValueError) if zombie in self.bereft or self.law.plan_hurt else OVERTAKEN
            assert zombie.error is None or isinstance(zombie.error, expected), zombie.error

    @precondition(lambda self: not self.zombies)
    @rule(loses_at=ACTS, stops_at=STEPS, shards=st.none() | st.lists(SHARD, unique=True))
    def lose_the_lease_while_an_answer_is_out(self, loses_at: int, stops_at: int, shards: list[int] | None) -> None:
        """A driver waits for an answer until a second one has its lease: both are stopped, the second one at any
        step."""
        first, second = Process(loses_at=loses_at, late=True), Process(stops_at=stops_at)
        if first.start(capture):
            self.zombies.append(first)
            first.seems_dead = True
            fill = capture_here if shards is None else _fill_some(shards)
            if second.start(lambda: capture(fill)):
                self.zombies.append(second)

    # Other events

    @rule(shard=SHARD, of=st.sampled_from([*ROUTES, "commit"]), how=st.sampled_from(sorted(DAMAGE)), at=st.integers(0))
    def damage_a_shard(self, shard: int, of: str, how: str, at: int) -> None:
        """Truncate or change an object of a shard."""
        key = f"{NAME}/expert/commits/{shard}.json" if of == "commit" else f"{NAME}/{of}/c/{shard}/0/0/0"
        if how == "a bit flipped":
            self.law.silent.add(key)
        self.damage(key, how, at)

    @precondition(lambda self: not self.law.plan_hurt and self.is_planned())
    @rule(which=st.integers(0), how=st.sampled_from(sorted(DAMAGE)), at=st.integers(0))
    def damage_the_plan(self, which: int, how: str, at: int) -> None:
        """Damage the plan; descriptions and records visibly."""
        keys = [key for key in sorted(self.law.snapshot()) if _is_of_the_plan(key)]
        key = keys[which % len(keys)]
        if how == "a bit flipped" and key.endswith(".json"):
            return
        self.damage(key, how, at)
        made_again = how == "gone" and key in (f"{NAME}/token/plan.json", f"{NAME}/zarr.json")
        self.law.plan_hurt = not made_again

    @precondition(lambda self: self.law.plan_hurt)
    @rule()
    def begin_anew(self) -> None:
        """Follow the advice for a damaged plan, perhaps while there are zombies."""
        self.objects.clear(NAME)
        self.bereft += self.zombies
        self.law.plan_hurt = False
        self.law.silent.clear()

    @rule(shard=SHARD)
    def give_up(self, shard: int) -> None:
        """Three workers failed with a shard."""
        group = CaptureGroup(STORE, NAME)
        if self.is_planned() and not group.committed(shard):
            group.quarantine(shard, {"errors": ["why"], "documents": []})

    @precondition(lambda self: self.is_planned())
    @rule(dies_at=st.none() | ACTS)
    def verify(self, dies_at: int | None) -> None:
        """Read everything back; silent damage is found."""
        process, found = Process(dies_at=dies_at), []
        error = process.run(lambda: found.append(verify(CaptureGroup(STORE, NAME))))
        if not process.dead and not (self.law.plan_hurt and isinstance(error, ValueError)):
            assert error is None, error
            self.assert_found(found[0])

    def assert_found(self, found: Findings) -> None:
        """A verification that finished has found all damage, and nothing else."""
        assert bool(found.plan) == self.law.plan_hurt, found
        files, clean, state = self.law.snapshot(), self.law.clean, coverage(STORE, NAME)
        assert set(found.shards) == set(state.wrong), (found, state)
        for shard in [] if self.law.plan_hurt else committed(state):
            key = f"{NAME}/expert/commits/{shard}.json"
            assert held_record(files[key]) == held_record(clean[key])
        self.law.silent.clear()

    @rule()
    def read(self) -> None:
        """Open the store with xarray."""
        self.law.reads()

    def is_planned(self) -> bool:
        """Whether the text is completely planned."""
        state = self.law.state()
        return state is not None and state.plan.complete

    def damage(self, key: str, how: str, at: int) -> None:
        """Damage an object, if there is one, without anyone noticing."""
        if not (data := self.law.snapshot().get(key)):
            return
        after = DAMAGE[how](data, at)
        if after is None:
            self.objects.delete(key)
        elif "/commits/" not in key or not _blames_the_tokens(data, after):
            self.objects.put(key, after)

    def teardown(self) -> None:
        """All stopped processes continue, then everything is repaired."""
        try:
            while self.zombies:
                self.go_on(0, None, None)
                self.the_store_equals_the_clean_run_or_says_what_is_missing()
            for _ in range(2):
                if self.is_planned():
                    self.verify(None)
                if self.law.plan_hurt:
                    self.begin_anew()
                self.capture(None, True)
            self.law.equals(self.law.snapshot())
            self.law.reads()
        finally:
            for zombie in self.zombies:
                zombie.end()
            self.simulation.__exit__(None, None, None)


def _fill_some(shards: Sequence[int]) -> Fill:
    """Like lost workers of a cluster: complete the plan and commit some shards in any order."""

    def fill(run: Any, captures: Sequence[Capture]) -> None:
        [capture] = captures
        capture.planner.run()
        replica = Replica()
        replica.load(run.assignment({capture.name: capture.lease.token}))
        missing = capture.missing(0, capture.planned_shards)
        for shard in shards:
            if shard in missing:
                replica.capture(capture.name, shard)

    return fill


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


def _blames_the_tokens(before: bytes, after: bytes) -> bool:
    """Whether a commit record names another checksum of the tokens: it is unknown which of the two is wrong."""
    one, other = held_record(before), held_record(after)
    return isinstance(other, dict) and one["token_crc32c"] != other["token_crc32c"]


def _is_of_the_plan(key: str) -> bool:
    of_routes = re.search("/(commits|faults|quarantine|expert/c|weight/c)/|/(environment|lease).json|/partial/", key)
    return key.startswith(f"{NAME}/") and not of_routes
