"""`store` and `workers` are what their `__init__` lists: each name loads, is documented, and costs nothing unused."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import store
import workers

ROOT = Path(__file__).parents[2]
NAMES = [(package, name) for package in (store, workers) for name in package.__all__]


@pytest.mark.parametrize("package", [store, workers])
def test_the_list_is_sorted_without_twins_and_all_of_it_is_in_dir(package: Any) -> None:
    assert list(package.__all__) == sorted(set(package.__all__))
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_public_name_loads_from_its_own_package_and_is_documented(package: Any, name: str) -> None:
    found = getattr(package, name)
    assert found.__module__.partition(".")[0] == package.__name__
    text = inspect.getdoc(found) or ""
    assert text
    assert not text.startswith(f"{name}("), "made by dataclass"
    if not inspect.isfunction(found):
        return
    parameters = inspect.signature(found).parameters
    assert all(each.annotation is not inspect.Parameter.empty for each in parameters.values())
    section = text.partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    described = {word for line in section.splitlines() if not line.startswith(" ") for word in line.split(", ")}
    assert described == set(parameters), "each parameter has its line, and no other"


@pytest.mark.parametrize("package", ["store", "workers"])
def test_importing_the_package_alone_loads_neither_torch_nor_what_only_readers_need(package: str) -> None:
    code = f"import sys, {package}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "xarray", "dask", "ray"}.isdisjoint(done.stdout.split())


def test_a_public_name_is_no_module_of_its_package_that_would_hide_it() -> None:
    for package, name in NAMES:
        importlib.import_module(getattr(package, name).__module__)
        assert not inspect.ismodule(getattr(package, name))
