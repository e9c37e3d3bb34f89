"""Ask where a token goes, what an expert gets, or which path a document's tokens take.

usage: python jobs/query.py STORE/DATASET QUESTION [options]

Examples:
  python jobs/query.py demo.zarr/demo-prose --token " the" --layer 3
  python jobs/query.py demo.zarr/demo-code --expert 3:5 --min_count 20
  python jobs/query.py demo.zarr --parquet tables

Questions, one of them:
  --token TOKEN             its experts, layer by layer; the, " the", "\\n", a piece or an id
  --token_id ID             the same, by the id alone
  --tokens CLASS            the experts of digits, keywords, punctuation, or '/regular expression/'
  --expert LAYER:EXPERT     its tokens, by count and by lift
  --document DOCUMENT       the experts of each of its tokens; by id or name; repeat for more
  --entropy                 how spread out the routers are; needs --record logits
  --saliency                what each expert contributes; needs --record output_norm
  --logprob                 the log-probability of the next token, by expert; needs --record logprob
  --parquet FOLDER          write tables of all data sets of STORE there

What counts:
  --layer LAYER             only this layer; repeat for more
  --phase PHASE             only tokens of the prompt, or only generated ones
  --role ROLE               only tokens of this speaker of a conversation; repeat for more
  --min_count N             with --expert: only tokens that occur at least N times (1)

Output:
  --top N                   with --expert: tokens to list (20)
  --json                    one JSON document, for scripts; docs/json.md names its keys

Counts are kept next to the store: the first question reads all of it, later ones do not.
docs/options.md explains every option. Exit status: 0 answered, 2 the question cannot be answered.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import start

start(__name__, __doc__)

import tyro

from jobs.console.arguments import parse
from jobs.console.asked_token import asked_token
from jobs.console.class_rows import class_question
from jobs.console.kept_answers import kept_answers
from jobs.console.places import capture_at, captures_at
from jobs.console.query_rows import Answer, Listed, document_answer, expert_answer
from jobs.console.recorded_rows import recorded_question
from jobs.console.tables import print_json, stdout_console
from jobs.console.terminal import log, reporting, run_job, shown

if TYPE_CHECKING:
    import xarray as xr

    from analysis.metrics.tokens import TokenOrder
    from analysis.scanning import Reducer
    from store import Coverage

ORDERS: "tuple[TokenOrder, ...]" = ("count", "lift")
HOW = ("place", "document", "parquet", "json")  # options that do not change an answer
RECORDED = ("entropy", "saliency", "logprob")  # questions that need what --record adds


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Ask where a token goes, which tokens an expert gets, or which path a document's tokens take.

    Special tokens, such as <s>, are never counted. For an incomplete capture, the captured part is used, and a line
    says so. Counts are kept next to the store: the first question reads all of it, later ones do not. Exit status: 0
    answered, 2 when the question cannot be answered.
    """

    place: Annotated[str, tyro.conf.Positional]
    """STORE/DATASET: demo.zarr/demo-prose, s3://bucket/routes.zarr/wikitext-103. STORE is sufficient if it has one data
    set, and means all data sets with --parquet."""
    token: str | None = None
    """A token: as text, "the" or " the" (with the space before it), as the tokenizer's piece, "▁the", "<0x0A>", "\\n",
    or by its id. Shows its experts by layer. If several tokens match, the answer is about the most frequent one, and
    the others are listed with their counts. Write --token=-x if it begins with a dash."""
    token_id: int | None = None
    """The same, by token id."""
    tokens: str | None = None
    """A token class, such as digits, punctuation, keywords or capitalized (an unknown name lists all), or a regular
    expression between slashes: '/^ ?[A-Z]/'. Shows its experts by layer, with intervals."""
    expert: str | None = None
    """An expert, as LAYER:EXPERT: 15:3. Shows its tokens, by count and by lift."""
    document: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A document, by its id, or by its name if that is not a number. Shows its path: each token's experts, layer by
    layer, the first choice first. May be repeated."""
    entropy: bool = False
    """How spread out each layer's router is over all experts, and how close the others came. Needs a capture with
    --record logits."""
    saliency: bool = False
    """What each expert contributes: its weight times the norm of its output, least first. Needs --record
    output_norm."""
    logprob: bool = False
    """The log-probability of the next token, by expert, also compared within the same token. Needs --record logprob."""
    parquet: str | None = None
    """A folder: write load, token_experts, transitions and the routes of each --document there, as Parquet, for all
    data sets of STORE. analysis/examples/queries.sql has DuckDB queries for them."""
    layer: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """With --token, --tokens, --document, --entropy, --saliency and --logprob: only this layer, by the model's own
    number. May be repeated. Default: all."""
    top: int = 20
    """With --expert: tokens to list."""
    min_count: int = 1
    """With --expert: leave out tokens that occur less often; the lift of a rare token is mostly chance."""
    phase: Annotated[tuple[Literal["prompt", "generated"], ...], tyro.conf.UseAppendAction] = ()
    """Only tokens of this phase, if the capture records it (imported routes do). May be repeated."""
    role: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only tokens of this speaker, if the capture contains conversations: assistant. May be repeated."""
    json: bool = False
    """One JSON document on standard output, for scripts: docs/json.md names its keys."""


def main(arguments: list[str]) -> int:
    """Answer."""
    config = parse(QueryConfig, "query", arguments)
    _check(config)
    documents = [int(document) if document.isdecimal() else document for document in config.document]
    if config.parquet is not None:
        return _write_tables(config, *captures_at(config.place), documents)
    return _answer(config, *capture_at(config.place), documents)


def _answer(config: QueryConfig, store: str, name: str, documents: list[int | str]) -> int:
    """Show the answers, or none if one of the questions is invalid."""
    from store import coverage

    state = coverage(store, name)
    if not state.complete:
        log(shown(f"note: {state}"))
    labels = {"phase": config.phase, "role": config.role}
    if documents:
        answers: Sequence[Answer] = _paths(config, store, state, documents)
    else:
        question = {name: value for name, value in asdict(config).items() if name not in HOW}
        answers = kept_answers(store, state, question, partial(_counted, config, store, state))
    if config.json:
        known = {"complete": state.complete, "shards_done": state.shards_done, "shards_total": state.shards_total}
        answered = [answer.as_json() for answer in answers]
        print_json({"store": store, "data_set": name, **known, **labels, "answers": answered})
        return 0
    console = stdout_console()
    for answer in answers:
        answer.draw(console)
    return 0


def _paths(config: QueryConfig, store: str, state: "Coverage", documents: list[int | str]) -> list[Answer]:
    """The path of each document."""
    from store.reader import open_covered

    capture = open_covered(store, state)
    asked = partial(document_answer, capture, layers=_layers(capture, config.layer))
    return [asked(document, roles=config.role, phases=config.phase) for document in documents]


def _write_tables(config: QueryConfig, store: str, names: list[str], documents: list[int | str]) -> int:
    """Write the files, and print their folder."""
    from analysis.exports.parquet import write_tables  # numba takes a second: --help must not wait for it

    folder = Path(config.parquet or "")
    write = partial(write_tables, datasets=names, documents=documents, roles=config.role, phases=config.phase)
    with reporting("tables", unit="shards", transient=True) as report:
        states = write(store, folder, progress=lambda name, done, total: report.add(1))
    for state in states:
        if not state.complete:
            log(shown(f"note: {state}"))
    print(folder.absolute())
    return 0


def _counted(config: QueryConfig, store: str, state: "Coverage") -> list[Listed]:
    """The answers that are counted over all tokens; mistakes are reported before counting."""
    from analysis.metrics.tokens import TokenCounts, check_ranking
    from analysis.results import measure
    from analysis.scanning import Selection
    from store.reader import open_covered

    capture = open_covered(store, state)
    layers = _layers(capture, config.layer)
    only = Selection(roles=config.role or None, phases=config.phase or None)
    answers: list[Callable[..., Listed]]
    reducers: Sequence[Reducer] = [TokenCounts()]
    if recorded := [name for name in RECORDED if getattr(config, name)]:
        reducers, answer_of = recorded_question(recorded[0], capture)
        answers = [partial(answer_of, capture, layers)]
    elif config.expert is not None:
        layer, expert = _expert(capture, config.expert)
        top, least = config.top, config.min_count
        check_ranking(top=top, by="count", min_count=least)
        answers = [partial(expert_answer, capture, layer, expert, top=top, by=by, min_count=least) for by in ORDERS]
    elif config.tokens is not None:
        reducers, answer_of = class_question(config.tokens, capture)
        answers = [partial(answer_of, capture, layers)]
    else:
        answers = [partial(asked_token(capture, config.token, config.token_id).answer, capture, layers)]
    with reporting(state.dataset, unit="shards", transient=True) as report:
        progress = lambda done, total: report.to(done)
        counts = measure(store, state.dataset, reducers, state=state, only=only, progress=progress)
    return [answer(*counts) for answer in answers]


def _check(config: QueryConfig) -> None:
    """Raise unless there is exactly one question, and for options that do not apply to it."""
    given = {
        "token": config.token is not None,
        "token_id": config.token_id is not None,
        "tokens": config.tokens is not None,
        "expert": config.expert is not None,
        "document": bool(config.document) and config.parquet is None,
        **{name: getattr(config, name) for name in RECORDED},
        "parquet": config.parquet is not None,
    }
    asked = [name for name, is_given in given.items() if is_given]
    if len(asked) != 1:
        got = " and ".join(f"--{name}" for name in asked) or "none"
        raise ValueError(f"use exactly one of {', '.join(f'--{name}' for name in given)}; got {got}")
    limits = {
        "layer": ("token", "token_id", "tokens", "document", *RECORDED),
        "top": ("expert",),
        "min_count": ("expert",),
        "json": ("token", "token_id", "tokens", "expert", "document", *RECORDED),
    }
    for option, questions in limits.items():
        if getattr(config, option) != getattr(QueryConfig, option) and asked[0] not in questions:
            goes_with = ", ".join(f"--{name}" for name in questions)
            raise ValueError(f"--{option} goes with {goes_with}, not with --{asked[0]}")
    if config.parquet is not None and "://" in config.parquet:
        raise ValueError(f"--parquet {config.parquet}: must be a folder on this machine")


def _layers(capture: "xr.Dataset", wanted: tuple[int, ...]) -> list[int]:
    """The requested layers, or all."""
    captured: list[int] = capture["layer"].values.tolist()
    if unknown := sorted(set(wanted) - set(captured)):
        raise ValueError(f"layers {unknown} were not captured; {capture.attrs['dataset']} has {captured}")
    return list(wanted) or captured


def _expert(capture: "xr.Dataset", place: str) -> tuple[int, int]:
    """The layer and the expert of LAYER:EXPERT."""
    parts = re.fullmatch(r"(\d+):(\d+)", place, re.ASCII)
    if parts is None:
        raise ValueError(f"--expert {place!r}: must be LAYER:EXPERT, such as 15:3")
    layer, expert = _layers(capture, (int(parts[1]),))[0], int(parts[2])
    if expert >= (experts := int(capture.attrs["num_experts"])):
        raise ValueError(f"--expert {place}: a layer has experts 0 to {experts - 1}")
    return layer, expert


if __name__ == "__main__":
    run_job(main)
