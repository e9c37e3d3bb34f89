"""What several tests share: the tiny model, loaded, and the command line."""

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine makes no test fail; the same examples every time when a change is judged.
settings.register_profile(
    "suite", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=os.environ.get("CI") == "true"
)
settings.load_profile("suite")
# Two processes that compute with two threads each on two cores wait for each other; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where no bytecode is written beside the code, hundreds of processes would compile torch anew, 8 seconds each.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    sys.dont_write_bytecode = False
# No power fails here, and a capture waits for the disk a hundred times; `power.py` has a disk that can lose its power.
os.fsync = lambda fd: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: `make test` gives files to its processes in this order, and what is long and
    comes last runs alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))


def pytest_collection_finish() -> None:
    """The garbage collector need not look through the libraries: it takes a third of a capture's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", params=["none", "nf4"])
def tiny_model(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """The tiny Mixtral as `load_model` gives it, unquantized and in NF4; leave it as you find it."""
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
    """A command that has ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `jobs/capture.py`, or another job, as its script does, but in this process."""
    from jobs import capture
    from jobs.console.terminal import run_job

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
