"""No clock of another host decides anything: a wrong date on a host changes nothing."""

import ast
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bucket import Bucket
from hypothesis import example, given, settings
from hypothesis import strategies as st
from more import MORE

from store import CaptureGroup, lease

ROOT = Path(__file__).parents[2]
DAY_S = 86_400.0
SHIFTS = st.sampled_from([-DAY_S, 0.0, DAY_S]) | st.floats(-400 * DAY_S, 400 * DAY_S)


class Clocks:
    """A host's two clocks: one counts the seconds that it sleeps, the other tells a date, which may be wrong.

    Parameters
    ----------
    shift_s
        Seconds by which the date is ahead.
    passes
        Called after each sleep with the seconds since it began: what other hosts do meanwhile.
    """

    def __init__(self, shift_s: float, passes: Callable[[float], None] = lambda seconds: None) -> None:
        self.shift_s, self.passes, self.seconds = shift_s, passes, 0.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.passes(self.seconds)

    def time(self) -> float:
        return 1.7e9 + self.seconds + self.shift_s

    def now(self, zone: Any = UTC) -> datetime:
        return datetime.fromtimestamp(self.time(), zone)


def outcome(shift_s: float, holders_shift_s: float, lives_s: float, count: bool) -> tuple[str, float, list[str]]:
    """The outcome of a job that finds the lease of another host, which renews it for a time.

    Returns
    -------
    tuple
        "taken" or the error, the seconds that it took, and its messages meanwhile.
    """
    group, files = CaptureGroup("simulated.zarr", "fake"), dict[str, bytes]()
    group.objects = Bucket("", files)
    holders = Clocks(holders_shift_s)
    record = {**lease._holder(), "token": "theirs", "host": "elsewhere", "processes": ["elsewhere"], "since": "then"}

    def renew(seconds: float) -> None:
        holders.seconds = seconds // lease.RENEW_S * lease.RENEW_S
        if seconds <= lives_s:
            renewed = holders.seconds / lease.RENEW_S if count else holders.time()  # as in earlier versions
            files["fake/token/lease.json"] = json.dumps({**record, "renewed": renewed}).encode()

    clocks, said = Clocks(shift_s, renew), list[str]()
    renew(0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "time", clocks)
        patch.setattr(lease, "datetime", clocks)
        patch.setattr(group.objects, "clear", lambda prefix: None)
        try:
            with lease.lease(group, said.append) as held:
                assert json.loads(files["fake/token/lease.json"])["token"] == held.token
            return "taken", clocks.seconds, said
        except RuntimeError as error:
            return str(error), clocks.seconds, said


@settings(max_examples=20 * MORE, deadline=None)
@example(DAY_S, 0.0, 0.0, True)
@example(-DAY_S, 0.0, 1e9, True)
@example(0.0, DAY_S, 1e9, False)
@example(0.0, -DAY_S, 1e9, False)
@given(SHIFTS, SHIFTS, st.sampled_from([0.0, 1e9]) | st.floats(0, 300), st.booleans())
def test_a_host_whose_clock_is_wrong_takes_over_and_is_refused_as_others_are(
    shift_s: float, holders_shift_s: float, lives_s: float, count: bool
) -> None:
    found = outcome(shift_s, holders_shift_s, lives_s, count)
    assert found == outcome(0.0, 0.0, lives_s, True)
    result, seconds, [said] = found
    if lives_s < lease.RENEW_S:
        assert result == "taken"
        assert lease.STALE_S <= seconds <= lease.STALE_S + lease.LOOK_S, "the record did not change for so long"
    else:
        assert "is being captured by process" in result
        assert seconds <= lease.RENEW_S + lease.LOOK_S, "a holder that lives is seen at its next renewal"
    assert said.endswith("on elsewhere since then: waiting up to 120 s to see whether it is alive")


def test_a_host_that_stood_still_while_it_watched_looks_again_before_it_takes_over() -> None:
    group, files = CaptureGroup("simulated.zarr", "fake"), dict[str, bytes]()
    group.objects = Bucket("", files)
    record = {**lease._holder(), "host": "elsewhere", "processes": ["elsewhere"]}
    files["fake/token/lease.json"] = json.dumps(record).encode()
    clocks = Clocks(0.0)
    read, looks = group.objects.get, list[float]()

    def get(key: str) -> bytes | None:
        found = read(key)
        looks.append(clocks.seconds)
        if len(looks) == 4:  # stopped after a read for ten minutes, in which the holder renews the lease
            clocks.seconds += 600.0
            files[key] = json.dumps({**record, "renewed": 30}).encode()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "time", clocks)
        patch.setattr(group.objects, "get", get)
        with pytest.raises(RuntimeError, match="is being captured by"), lease.lease(group):
            pytest.fail("the lease of a living job was taken")


READ = {"store/lease.py": 1, "analysis/explorer/index.py": 1}
"""Where a date is read, and how often: it is printed, or compared with others from the clock of the same file
system."""
DATES = {"time", "time_ns", "now", "utcnow", "today", "st_mtime", "st_mtime_ns", "st_ctime", "last_modified"}


@pytest.mark.parametrize(
    "room", ["store", "workers", "jobs/capturing", "jobs/cluster", "jobs/sources", "analysis/explorer"]
)
def test_no_date_is_compared_with_this_host_s_where_stores_are_shared(room: str) -> None:
    files = {file.relative_to(ROOT).as_posix(): file.read_text() for file in (ROOT / room).rglob("*.py")}
    found = {name: len(_dates(text)) for name, text in files.items() if _dates(text)}
    assert found == {name: times for name, times in READ.items() if name in files}
    assert _dates("time.time() - os.stat(x).st_mtime") == ["st_mtime", "time"]


def _dates(text: str) -> list[str]:
    read = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute) and node.attr in DATES)
    # `now` of anything else is what an index of the explorer holds.
    return sorted(node.attr for node in read if node.attr != "now" or ast.unparse(node.value).endswith("datetime"))
