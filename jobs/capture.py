"""Capture routes: `python jobs/capture.py --dataset wikitext-103 --local`.

Plans each data set (text to rows), then fills every shard that is missing. Nothing is done twice: what is planned
or committed is kept, and the same command goes on from there.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import socket
from typing import TYPE_CHECKING

from dotenv import dotenv_values, find_dotenv

from jobs.config import parse_capture
from jobs.local import capture_missing
from jobs.terminal import planned, reporting, run_job, say
from store.coverage import Coverage, coverage
from store.group import CaptureGroup
from store.lease import lease

if TYPE_CHECKING:
    from jobs.documents import Source
    from jobs.prepare import Run


def main(arguments: list[str]) -> int:
    """Run the command; 0 when every data set is complete."""
    config = parse_capture(arguments)
    if config.print_config:
        print(config.as_yaml(), end="")
        return 0
    if not config.dataset:
        raise ValueError("give at least one --dataset, such as --dataset demo:prose; --help lists the kinds")
    if not (config.local or config.dry_run):
        raise ValueError("capturing on a Ray cluster is not built yet: add --local to capture in this process")
    _take_token()
    # Imports torch and transformers, which take seconds: --help does not wait for them.
    from jobs.prepare import Run

    run = Run(config)
    if config.dry_run:
        from jobs.estimate import print_estimate

        for name, source in run.sources():
            print_estimate(run, name, source)
        return 0
    states = [capture_dataset(run, name, source) for name, source in run.sources()]
    return 0 if all(state.complete for state in states) else 1


def _take_token() -> None:
    """HF_TOKEN from a `.env` file, before a hub library reads the environment; nothing else that stands in there."""
    token = dotenv_values(find_dotenv(usecwd=True)).get("HF_TOKEN")
    if token:
        os.environ.setdefault("HF_TOKEN", token)


def capture_dataset(run: "Run", name: str, source: "Source") -> Coverage:
    """Plan one data set and fill its shards, as far as that is not done yet."""
    from jobs.plan import Planner

    prepared = run.prepare(name, source)
    if source.note:
        say(f"{name}: {source.note}")
    with lease(CaptureGroup(run.config.store_path, name)):  # before the group is made: two makers would mix layouts
        group = run.open_group(prepared)
        planner = Planner(group, source, run.tokenizer, bos=run.config.bos, limit_documents=run.config.limit_documents)
        with reporting(f"plan {name}", done=planner.plan.tokens) as report:
            plan = planner.run(lambda plan: report.to(plan.tokens, f"{plan.documents:,} documents"))
        say(f"{name}: {planned(plan, source.published_documents)}")
        before = coverage(group.path, name)
        if before.lost:
            raise ValueError(f"{group.path}: {before}")
        if before.complete:
            say(f"{before}; nothing to do")
            return before
        engine = run.engine  # loads the model, outside the rate
        facts = {"worker": f"{socket.gethostname()}:{os.getpid()}", "versions": run.environment}
        with reporting(f"capture {name}", total=plan.tokens, done=before.tokens_done) as report:
            capture_missing(
                group,
                engine,
                batch_tokens=run.batch_tokens,
                facts=facts,
                heal=lambda shard, reason: say(f"{name}: shard {shard} is captured again: {reason}"),
                progress=lambda tokens: report.to(report.done + tokens),
            )
        rate = report.rate()
    state = coverage(group.path, name)
    say(f"{state}, {state.bytes_done:,} bytes, {rate:,.0f} tokens/s in {group.path}")
    return state


if __name__ == "__main__":
    run_job(main)
