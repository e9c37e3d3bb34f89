"""Fixtures of several tests: the loaded tiny model and the command line."""

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from workers.text.tokenizer import TextTokenizer

# A busy machine must not make a test fail, and every change is tested with the same examples.
settings.register_profile(
    "suite", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=os.environ.get("CI") == "true"
)
settings.load_profile("suite")
# Two processes that compute with two threads each on two cores wait for each other; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# If no bytecode is written next to the code, hundreds of processes would compile torch again, 8 seconds each.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    sys.dont_write_bytecode = False
# There are no power failures here, and a capture waits for the disk a hundred times; `power.py` simulates a disk that
# loses power.
os.fsync = lambda fd: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: `make test` distributes files in this order, and a long file at the end would
    run alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from scanning the libraries, which takes a third of a capture's time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Some libraries count their objects when Python ends and must not find them."""
    gc.unfreeze()


@pytest.fixture(scope="session", params=["none", "nf4"])
def tiny_model(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """The tiny Mixtral from `load_model`, unquantized and in NF4. Tests must not change it."""
    from workers.models.loading import load_model
    from workers.tiny import tiny_checkpoint

    return load_model(tiny_checkpoint(), quantization=request.param, device="cpu")


@pytest.fixture(scope="session")
def gpu() -> None:
    """A CUDA device, or the test is skipped."""
    import torch

    if not torch.cuda.is_available():
        assert os.environ.get("REQUIRE_GPU") != "1", "REQUIRE_GPU=1, and there is no GPU"
        pytest.skip("no GPU")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A finished command."""

    status: int
    out: str
    err: str


def _tokenizer(model: str | Path, revision: str | None = None, **options: Any) -> "TextTokenizer":
    """`load_tokenizer` that reads the tiny Mixtral's tokenizer only once, which takes a third of a small capture's
    time."""
    from workers.text.tokenizer import load_tokenizer
    from workers.tiny import tiny_checkpoint

    return _tiny_tokenizer(**options) if model == tiny_checkpoint() else load_tokenizer(model, revision, **options)


@cache
def _tiny_tokenizer(**options: Any) -> "TextTokenizer":
    from workers.text.tokenizer import load_tokenizer
    from workers.tiny import tiny_checkpoint

    return load_tokenizer(tiny_checkpoint(), **options)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `jobs/capture.py`, or another job, like its script, but in this process."""
    from jobs import capture
    from jobs.capturing import run as capturing
    from jobs.console.terminal import run_job

    monkeypatch.setattr(capturing, "load_tokenizer", _tokenizer)

    def run(*arguments: object, main: Callable[[list[str]], int] = capture.main) -> Ran:
        monkeypatch.setattr(sys, "argv", ["job", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                run_job(main)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Ran(status=int(ended.value.code or 0), out=captured.out, err=captured.err)

    return run
