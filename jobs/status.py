"""Report what is captured and what is missing, and whether it still equals what was committed.

usage: python jobs/status.py STORE[/DATASET] [options]

Examples:
  python jobs/status.py demo.zarr
  python jobs/status.py demo.zarr/demo-prose --verify
  python jobs/status.py s3://bucket/routes.zarr --json

Options:
  --verify                  read everything back and compare it with what was committed
  --json                    one JSON document, for scripts; docs/json.md names its keys

Safe while a capture runs. docs/options.md explains every option.
Exit status: 0 everything is complete, 1 something is missing or damaged, 2 no such store.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import start

start(__name__, __doc__)

import tyro
from rich.console import Console

from jobs.console.arguments import parse
from jobs.console.places import captures_at
from jobs.console.tables import Bars, Column, Facts, print_json, print_line, print_table, stdout_console
from jobs.console.terminal import log, reporting, run_job, shown
from store.coverage import Coverage, coverage
from store.group import CaptureGroup
from store.identity import LATER, changes_in_words
from store.lease import lease_holder
from store.verification import Findings, verify


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Report, for each data set of a store, what is captured and what is missing.

    Safe while a capture runs. Exit status: 0 when every data set is complete, 1 when something is missing or damaged, 2
    when there is no such store.
    """

    place: Annotated[str, tyro.conf.Positional]
    """STORE, or STORE/DATASET for one of its data sets; the store is a folder, or s3://bucket/prefix."""
    verify: bool = False
    """Read everything back and compare it with the commit records. Damaged shards are marked in the store, and the next
    capture redoes them."""
    json: bool = False
    """One JSON document on standard output, for scripts: docs/json.md names its keys."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """The findings about one data set."""

    data_set: str
    state: Coverage | None = None
    """None if it cannot be read."""
    found: Findings | None = None
    """The findings of --verify."""
    holder: str | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is missing or damaged."""
        return self.state is not None and self.state.complete and self.holds is not False

    @property
    def holds(self) -> bool | None:
        """Whether everything could be read back as committed; None if it was not verified."""
        return None if self.found is None else not (self.found.shards or self.found.plan)


def main(arguments: list[str]) -> int:
    """Print the findings; 0 when every data set is complete."""
    config = parse(StatusConfig, "status", arguments)
    store, names = captures_at(config.place)
    looked = [_look(store, name, deep=config.verify) for name in names]
    whole = all(one.whole for one in looked)
    if config.json:
        print_json({"store": store, "whole": whole, "data_sets": [facts(one) for one in looked]})
    else:
        print_status(stdout_console(), looked)
    return 0 if whole else 1


def _look(store: str, name: str, *, deep: bool) -> Looked:
    """The findings about one data set; what is not in its coverage is logged immediately."""
    found = None
    try:
        group = CaptureGroup(store, name)
        if deep:
            found = _verified(group)
        state = coverage(store, name)
    except ValueError as error:
        log(shown(f"error: {error}"))
        return Looked(data_set=name, found=found, error=str(error))
    if holder := lease_holder(group):
        log(shown(f"{name}: being captured by {holder}"))
    return Looked(data_set=name, state=state, found=found, holder=holder, identity=LATER | group.identity)


def _verified(group: CaptureGroup) -> Findings:
    """Read everything back, and report faults of the plan.

    Damaged shards are marked in the store, and reported with what is missing.
    """
    tokens = coverage(group.path, group.dataset).tokens_done
    with reporting(f"verify {group.dataset}", total=tokens, transient=True) as report:
        found = verify(group, report.add)
    for fault in found.plan:
        log(shown(f"{group.dataset}: the plan is damaged: {fault}; {group.remedy}"))
    if not (found.plan or found.shards):
        log(shown(f"{group.dataset}: verified: {tokens:,} tokens equal what was committed"))
    if found.unnoted:
        for shard, reason in found.shards.items():
            log(shown(f"{group.dataset}: shard {shard} failed verification: {reason}"))
        log(shown(f"error: the store cannot be written, so the next capture will not know about this: {found.unnoted}"))
    return found


def facts(one: Looked) -> dict[str, Any]:
    """A data set's row, of the table and of --json; see `StatusConfig.json`."""
    state, found = one.state, one.found
    wrong = {**(state.wrong if state else {}), **(found.shards if found else {})}
    row = {
        "data_set": one.data_set,
        "complete": state is not None and state.complete,
        "holds": one.holds,
        "quantization": one.identity.get("quantization"),
        "matmul": one.identity.get("matmul"),
        "record": one.identity.get("record"),
        "weight_bits": one.identity.get("weight_bits"),
        **{name: one.identity.get(name) for name in CHANGES},
        **{key: None if state is None else fact(state) for key, fact in KNOWN.items()},
        "wrong": [{"shard": shard, "reason": reason} for shard, reason in sorted(wrong.items())],
        "plan_faults": None if found is None else found.plan,
        "not_noted": None if found is None else found.unnoted,
        "captured_by": one.holder,
        "error": one.error,
    }
    return {**row, "state": _in_a_word(row)}


CHANGES = ("mask", "force", "top_k", "routes_from", "routes_weights")
KNOWN: dict[str, Callable[[Coverage], Any]] = {
    "plan_complete": lambda state: state.plan.complete,
    "shards_total": lambda state: state.shards_total,
    "shards_done": lambda state: state.shards_done,
    "missing": lambda state: state.missing,
    "rows": lambda state: state.plan.rows,
    "documents": lambda state: state.plan.documents,
    "documents_empty": lambda state: state.plan.documents_empty,
    "documents_repaired": lambda state: state.plan.documents_repaired,
    "documents_skipped": lambda state: state.plan.documents_skipped,
    "skipped": lambda state: list(state.plan.skipped),
    "tokens_planned": lambda state: state.plan.tokens,
    "tokens_done": lambda state: state.tokens_done,
    "bytes_done": lambda state: state.bytes_done,
    "seconds": lambda state: state.seconds,
    "digest": lambda state: state.digest,
    "quarantined": lambda state: [
        {"shard": shard, "documents": record.get("documents"), "errors": record.get("errors")}
        for shard, record in state.quarantined.items()
    ],
    "lost": lambda state: state.lost,
}


def _in_a_word(row: Facts) -> str:
    """A data set's state: its most serious problem."""
    if row["error"] is not None:
        return "cannot be read"
    if row["lost"] or row["plan_faults"]:
        return "plan damaged"
    missing, quarantined = len(row["missing"]), len(row["quarantined"])
    if row["wrong"]:
        return f"damaged {len(row['wrong']):,}"
    if missing > quarantined:
        return f"missing {missing:,}"
    if quarantined:
        return f"quarantined {quarantined:,}"
    return "complete" if row["plan_complete"] else "plan unfinished"


def print_status(console: Console, looked: list[Looked]) -> None:
    """One line per data set, and details of what is missing or damaged."""
    rows = [facts(one) for one in looked]
    said = (RECORDED, CHANGED)  # shown only if some data set has a value
    columns = [column for column in COLUMNS if column not in said or any(column.text(row) != "-" for row in rows)]
    print_table(console, columns, rows)
    for state in (one.state for one in looked if one.state is not None):
        if not state.complete:
            print_line(console, str(state))
        if skipped := state.plan.documents_skipped:
            names = ", ".join(map(repr, state.plan.skipped[:3])) + " and others" * (skipped > 3)
            print_line(
                console, f"{state.dataset}: {skipped:,} documents were skipped because they cannot be rendered: {names}"
            )
        for shard, reason in state.wrong.items():
            print_line(console, f"{state.dataset}: shard {shard} failed verification: {reason}")


def _count(key: str) -> Callable[[Facts], str]:
    return lambda row: "-" if row[key] is None else f"{row[key]:,}"


def _ratio(over: str, under: str, form: str) -> Callable[[Facts], str]:
    return lambda row: format(row[over] / row[under], form) if row[under] else "-"


def _precision(row: Facts) -> str:
    """The precision of the weights, and of their products if it is not the usual one."""
    kept, matmul = row["quantization"] or "-", row["matmul"]
    return kept if matmul in (None, LATER["matmul"]) else f"{kept}, {matmul} products"


def _shards(row: Facts) -> str:
    if row["error"] is not None:
        return "-"
    return f"{row['shards_done']:,}/{row['shards_total']:,}{'' if row['plan_complete'] else '+'}"


def _colour(row: Facts) -> str:
    if row["state"] == "complete":
        return "green"
    return "red" if row["error"] is not None or row["wrong"] or row["lost"] or row["plan_faults"] else "yellow"


RECORDED = Column(name="also recorded", text=lambda row: ", ".join(row["record"] or "-"), left=True, spare=10)
CHANGED = Column(name="changed", text=lambda row: changes_in_words(row) or "-", left=True, spare=11)
COLUMNS = (
    Column(name="data set", text=lambda row: row["data_set"], left=True, elastic=True),
    Column(name="shards", text=_shards),
    Column(name="missing", text=lambda row: "-" if row["missing"] is None else f"{len(row['missing']):,}", spare=8),
    Column(name="documents", text=_count("documents"), spare=3),
    Column(name="tokens", text=_count("tokens_done"), spare=2),
    Column(name="of planned", text=_ratio("tokens_done", "tokens_planned", ".1%"), spare=5),
    Bars(part=lambda row: row["tokens_done"] / row["tokens_planned"] if row["tokens_planned"] else None, style=_colour),
    Column(name="bytes", text=_count("bytes_done"), spare=4),
    Column(name="bytes/token", text=_ratio("bytes_done", "tokens_done", ".1f"), spare=7),
    Column(name="tokens/s per worker", text=_ratio("tokens_done", "seconds", ",.0f"), spare=6),
    Column(name="weights", text=_precision, left=True, spare=9),
    RECORDED,
    CHANGED,
    Column(name="state", text=lambda row: row["state"], left=True, style=_colour),
)


if __name__ == "__main__":
    run_job(main)
