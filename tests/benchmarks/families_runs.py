"""Runs work on every family, each in its own process with a time limit, and stores the outcome in a file."""

import argparse
import json
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_families import families

LIMIT_S = 600  # per family; arbitrary, for a busy machine
Outcome = dict[str, Any]


def on_every_family(
    result: Path,
    described: str | None,
    work: Callable[[str], Outcome],
    crashed: Callable[[str], Outcome] = lambda reason: {"crashed": reason},
) -> Iterator[tuple[str, Outcome]]:
    """Do the work on all families, or on those named on the command line, and write the outcome after each.

    Parameters
    ----------
    result
        The file, which keeps the families that are not named.
    described
        The script's help.
    work
        A function from a model type to its outcome; empty if it has no experts.
    crashed
        The outcome of an error, of a process that ended or of one that took too long, from the reason.
    """
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="model types, of which the outcome is written anew; by default all")
    asked = parser.parse_args().only
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kept = json.loads(result.read_text(encoding="utf-8"))["families"] if asked and result.exists() else {}
    versions = {name: version(name) for name in ("transformers", "torch", "bitsandbytes")}
    for model_type in asked or families():
        kept.pop(model_type, None)
        if outcome := _in_a_process(work, crashed, model_type):
            kept[model_type] = outcome
            print(f"{model_type}: {json.dumps(outcome)}", flush=True)
            yield model_type, outcome
        held = {"versions": versions, "families": dict(sorted(kept.items()))}
        result.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def _in_a_process(work: Callable[[str], Outcome], crashed: Callable[[str], Outcome], model_type: str) -> Outcome:
    """Runs in a fork, because importing takes longer than the work; it is ended after a time limit."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(_without_raising(work, crashed, model_type)))
    process.start()
    there.close()
    try:
        answer: Outcome = here.recv() if here.poll(LIMIT_S) else crashed(f"more than {LIMIT_S} s")
    except EOFError:
        answer = crashed("its process ended")
    process.kill()
    process.join()
    return answer


def _without_raising(work: Callable[[str], Outcome], crashed: Callable[[str], Outcome], model_type: str) -> Outcome:
    try:
        return work(model_type)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return crashed(f"{type(error).__name__}: {' '.join(str(error).split())}")
