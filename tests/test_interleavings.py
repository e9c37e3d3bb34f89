"""Whatever happens in whatever order, the store equals a clean serial run, byte for byte, or says what is missing.

`interleavings` is the machine. `make test` runs the same short search every time; `make chaos` a long one that is
another each time, and says with which seed. What it found is kept here, by name.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bucket import Bucket
from fake_model import store_files
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from interleavings import Interleavings
from law import Files
from s3_server import bucket_files, new_store, server_address  # noqa: F401
from simulated import Process, capture, simulation

import store.group
from store import CaptureGroup
from store.objects import LocalObjects
from store.planned import PlannedGroup
from store.s3 import S3Objects

STEPS = 165
"""Of an undisturbed capture: what it does to the store, and how often it looks."""


@pytest.fixture(scope="module")
def clean() -> Files:
    """The store of a clean serial run."""
    files: dict[str, bytes] = {}
    with simulation(lambda scratch: Bucket(scratch, files)):
        process = Process()
        assert process.run(capture) is None
    assert 0.9 * STEPS < process.steps < 1.1 * STEPS
    return files


@pytest.fixture
def in_memory(clean: Files) -> Callable[[], Interleavings]:
    """Makes machines over a bucket in memory."""

    def make() -> Interleavings:
        files: dict[str, bytes] = {}
        return Interleavings(lambda scratch: Bucket(scratch, files), lambda: dict(files), clean)

    return make


def search(make: Callable[[], Interleavings], examples: int, number: int | None = None, shrink: bool = True) -> None:
    """Run so many examples; the same ones every time, or those of a seed."""
    phases = [Phase.generate] + [Phase.shrink] * shrink
    machine = make if number is None else seed(number)(make)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=20, phases=phases, derandomize=number is None, database=None,
            deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_every_interleaving_leaves_the_clean_store_or_says_what_is_missing_in_a_bucket(
    in_memory: Callable[[], Interleavings],
) -> None:
    search(in_memory, 50)
