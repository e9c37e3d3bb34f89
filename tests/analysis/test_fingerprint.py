"""Fingerprints: different for code that computes something else, equal in every process, and missing if unknown.

What is stored under them is tested elsewhere: results in `test_results.py`; machine code here.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest

import analysis
from analysis.compiled import Kernel
from analysis.fingerprint import fingerprint
from analysis.metrics.choice_kernels import in_common
from analysis.metrics.choices import Choices
from analysis.scanning import Selection, accumulate

ROOT = Path(__file__).parents[2]


def defined(code: str, name: str = "f", **given: object) -> Any:
    """The definitions of some code, as in a notebook's cell."""
    names = {"__name__": "__main__", "np": np, **given}
    exec(code, names)
    return names[name]


F = "def f(x): return x + 1"
OTHERS = {
    "a constant": "def f(x): return x + 2",
    "an operation": "def f(x): return x - 1",
    "a default": "def f(x, y=1): return x + 1",
    "an inner function": "def f(x): return (lambda: x + 1)()",
    "a name": "def f(x): return x + len",
}


@pytest.mark.parametrize("code", OTHERS.values(), ids=OTHERS)
def test_other_code_has_another_fingerprint(code: str) -> None:
    assert fingerprint(defined(F)) != fingerprint(defined(code))
    assert fingerprint(defined(F)) == fingerprint(defined(f"# a comment\n\n{F}"))


def two(template: str, one: str, other: str, **given: object) -> tuple[str, str]:
    return tuple(fingerprint(defined(template.replace("HERE", it), **given)) for it in (one, other))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "template",
    [
        "K = HERE\ndef f(x): return x + K",
        "def g(x): return x + HERE\ndef f(x): return g(x)",
        "def g(x): return x + HERE\ndef h(x): return g(x)\ndef f(x): return [h(y) for y in x]",
        "class B:\n  def m(self): return HERE\nclass f(B): pass",
        "class f:\n  m = HERE",
        "class f:\n  @property\n  def m(self): return HERE",
        "class f:\n  @staticmethod\n  def m(): return HERE",
        "class f:\n  @classmethod\n  def m(cls): return HERE",
        "class A:\n  def __init__(self, v): self.v = v\nf = A(HERE)",
        "class A:\n  def m(self): return HERE\na = A()\ndef f(): return a.m()",
        "def outer(v):\n  def f(): return v\n  return f\nf = outer(HERE)",
        "def f(x): return x in {1, 2, HERE}",
        "f = {'a': [HERE]}",
        "f = partial(max, HERE)",
        "def g(x=HERE): return x\nf = cache(g)",
        "f = dataclass(type('D', (), {'__annotations__': {'v': int}}))(HERE)",
        "f = np.array([0] * 5000 + [HERE])",
        "f = np.array([0, HERE], dtype=object)",
    ],
)
def test_what_is_referred_to_counts(template: str) -> None:
    given = {"partial": partial, "cache": cache, "dataclass": dataclass}
    one, other = two(template, "3", "4", **given)
    assert one != other
    assert one == two(template, "3", "3", **given)[1]


class Pair(NamedTuple):
    """A class that Python generated: its methods are not in any code."""

    a: int
    b: int


def test_values_of_other_types_are_other_values() -> None:
    values = [1, 1.0, True, "1", b"1", np.int64(1), np.int32(1), (1,), [1], {1}, {1: 1}, (1, 1), None]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(Selection(tokens=(1,))) != fingerprint(Selection(documents=(1,)))
    assert fingerprint(np.zeros((2, 3))) != fingerprint(np.zeros((3, 2)))
    assert fingerprint({"a", "b", "c"}) == fingerprint({"c", "b", "a"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.random.default_rng(0),
        lambda: sys.stdout,
        lambda: Path(__file__),
        object,
        lambda: Pair(1, 1),
        lambda: defined("@njit\ndef f(x): return x", njit=numba.njit),
    ],
    ids=["random numbers", "a file", "a path", "an object", "a named tuple", "a kernel of a cell"],
)
def test_what_may_compute_anything_has_none(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"cannot determine what|is not in a file"):
        fingerprint(make())


def test_code_without_a_module_is_not_taken_for_an_installed_one() -> None:
    names: list[dict[str, Any]] = [{}, {}]
    for number, space in enumerate(names):
        exec(f"class Mine:\n  def update(self): return {number}", space)
        assert space["Mine"].__module__ == "builtins"
    assert fingerprint(names[0]["Mine"]) != fingerprint(names[1]["Mine"])


def test_references_in_a_circle_end() -> None:
    assert two("class f:\n  def m(self): return f, HERE", "1", "1")[0]
    assert fingerprint(accumulate)


def test_it_is_the_same_in_every_process() -> None:
    code = "from analysis.fingerprint import fingerprint\nfrom analysis.scanning import accumulate, Selection\n"
    code += "from analysis.metrics.choice_kernels import in_common\nfrom analysis.metrics.choices import Choices\n"
    code += "print(fingerprint(accumulate, Choices(), in_common, Selection(), {'a', 'b', 'c'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = fingerprint(accumulate, Choices(), in_common, Selection(), {"a", "b", "c"})
    assert done.stdout.strip() == wanted


# --- Machine code -----------------------------------------------------------------------------------------------------

CALLEE = "from analysis.scanning import kernel\nSTEP = {step}\n@kernel\ndef by(x):\n    return x * {times}\n"
CALLER = (
    "from analysis.scanning import kernel\nfrom callee import STEP, by\n"
    "@kernel\ndef f(x):\n    return g(x) + STEP\n@kernel\ndef g(x):\n    return by(x)\n"
)


def test_a_kernel_is_compiled_anew_when_another_file_s_kernel_or_constant_changes(tmp_path: Path) -> None:
    """The files differ in one digit: neither their length nor that of the caller differs."""

    def run() -> tuple[int, int]:
        code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; sys.dont_write_bytecode = True\n"
        code += "from caller import f\nprint(f(10), sum(f.compiled.stats.cache_hits.values()))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found, hits = map(int, done.stdout.split())
        return found, hits

    (tmp_path / "caller.py").write_text(CALLER)
    found = []
    for step, times in ((1, 2), (1, 2), (1, 3), (5, 3)):
        (tmp_path / "callee.py").write_text(CALLEE.format(step=step, times=times))
        found.append(run())
    assert found == [(21, 0), (21, 1), (31, 0), (35, 0)]


def test_the_kernels_of_the_analysis_are_kept_for_the_next_process() -> None:
    from numba.core.caching import NullCache

    for name in analysis.__all__:
        getattr(analysis, name)
    kernels = {
        f"{name}.{key}": value
        for name, module in list(sys.modules.items())
        if name.startswith("analysis.")
        for key, value in vars(module).items()
        if isinstance(value, Kernel)
    }
    assert len(kernels) > 20
    assert [name for name, found in kernels.items() if isinstance(found.compiled._cache, NullCache)] == []
