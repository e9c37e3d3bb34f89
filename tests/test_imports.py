"""Imports between modules, the modules that a reader's process loads, and how the scripts are started."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import pytest
from patience import HUNG_S

ROOT = Path(__file__).parents[1]
PACKAGES = ("store", "workers", "analysis", "jobs")
MAY_IMPORT = {
    "store": {"store"},
    "workers": {"workers", "store"},
    "analysis": {"analysis", "store"},
    "jobs": {"jobs", "workers", "analysis", "store"},
}
ROOMS = {
    "workers": [
        *["shard", "given", "environment", "tiny", "record", "interventions", "text", "imports", "models"],
        *["recordings", "recorder", "replica", "engine", "importance", "notebook"],
    ],
    "jobs": ["console", "sources", "capturing", "cluster"],  # and then the scripts
    "analysis": [
        *["escaping", "token_classes", "attributes", "fingerprint", "compiled", "scanning", "statistics", "results"],
        *["charts", "metrics", "doctor", "exports", "report", "explorer", "examples"],
    ],
}
"""Files and folders of a package, from the bottom up: each may import from those before it."""
HEAVY = ("torch", "transformers", "ray", "bitsandbytes", "accelerate", "datasets")
LOAD_MODELS = {
    "jobs/train_tiny.py",
    "workers/text/chat.py",
    "workers/models/checkpoint.py",
    "workers/models/description.py",
    "workers/models/fp8_loading.py",
    "workers/models/loading.py",
    "workers/models/names.py",
    "workers/models/packing.py",
    "workers/models/quantizer.py",
    "workers/models/quantizers.py",
    "workers/models/stacking.py",
}
"""The modules that may name transformers: those that describe, load, quantize and train a model, and chat templates."""
SCRIPTS = sorted(
    path.stem for path in (ROOT / "jobs").glob("*.py") if "\nif __name__ ==" in path.read_text(encoding="utf-8")
)
COMMANDS = [script for script in SCRIPTS if script != "demo"]  # the demo has no options
CAPTURING = ("jobs.demo", "jobs.steer")
"""Scripts that capture, as jobs/capture.py does."""
FORMS = {
    "script": lambda script: [sys.executable, str(ROOT / "jobs" / f"{script}.py")],
    "module": lambda script: [sys.executable, "-m", f"jobs.{script}"],
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it; relative imports made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            yield ".".join([*parents, *filter(None, [node.module])])


def names(path: Path, word: str) -> bool:
    """Whether the code of a file, without its texts and comments, imports or contains a name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spelled = (node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute))
    used = {node.id if isinstance(node, ast.Name) else node.attr for node in spelled}
    return word in used or any(name.partition(".")[0] == word for name in imported(path))


def fresh(code: str, cwd: Path, *options: str) -> str:
    """What a new interpreter with the repository on its path prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Directions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    assert modules(package)
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imported(path)
        if name.partition(".")[0] in set(PACKAGES) - MAY_IMPORT[package] | {"tests"}
    ]
    assert wrong == []


def by_name() -> dict[str, Path]:
    """All modules of this project."""
    files = (path for package in PACKAGES for path in modules(package))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def ours(path: Path, known: Set[str]) -> set[str]:
    """This project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & known or {node.module}
    return found & known


@pytest.mark.parametrize("package", ROOMS)
def test_imports_between_rooms_point_down(package: str) -> None:
    files = {name: path for name, path in by_name().items() if name.startswith(f"{package}.")}
    rooms = [*ROOMS[package], *SCRIPTS] if package == "jobs" else ROOMS[package]
    assert {name.split(".")[1] for name in files} == set(rooms)
    place = {name: rooms.index(name.split(".")[1]) for name in files}
    wrong = [
        f"{name} imports {used}"
        for name, path in files.items()
        for used in ours(path, files.keys())
        if place[used] > place[name] or (package == "jobs" and used.split(".")[1] in SCRIPTS and name not in CAPTURING)
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    files = by_name()
    left = {name: ours(path, files.keys()) - {name} for name, path in files.items()}
    assert sum(map(len, left.values())) > 300  # else this finds nothing
    while ready := [name for name, used in left.items() if not used & left.keys()]:
        for name in ready:
            del left[name]
    assert left == {}


def test_a_script_has_a_main_and_what_has_none_lies_in_a_folder() -> None:
    scripts = [path for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__"]
    assert sorted(path.stem for path in scripts) == SCRIPTS
    assert all("\ndef main(" in path.read_text(encoding="utf-8") for path in scripts)
    folders = {path.stem for path in (ROOT / "jobs").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders.isdisjoint(SCRIPTS)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_says_what_it_is(package: str) -> None:
    folders = {path.parent for path in modules(package)} - {ROOT / "analysis" / "examples"}
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


def test_transformers_is_named_only_where_models_are_loaded() -> None:
    named = {
        str(path.relative_to(ROOT)) for package in PACKAGES for path in modules(package) if names(path, "transformers")
    }
    assert named <= LOAD_MODELS
    assert named  # else this finds nothing


def test_the_search_for_imports_finds_every_form(tmp_path: Path) -> None:
    file = ROOT / "store" / "imaginary.py"

    class Text(type(file)):  # type: ignore[misc]
        def read_text(self, encoding: str | None = None) -> str:
            return (
                "import a.b, c\ndef f():\n    from d.e import g\n    from . import h\n    from .i import j\nx = k.l\n"
            )

    assert list(imported(Text(file))) == ["a.b", "c", "d.e", "store", "store.i"]
    assert [names(Text(file), word) for word in ("k", "l", "c", "a", "d", "g", "import")] == [True] * 5 + [False] * 2


@pytest.mark.parametrize("package", ["store", "analysis"])
def test_a_reader_loads_neither_torch_nor_transformers_nor_ray(package: str, tmp_path: Path) -> None:
    stems = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules(package)]
    stems = [name.removesuffix(".__init__") for name in stems]
    code = f"import sys, json, {', '.join(stems)}\nprint(json.dumps(sorted(sys.modules)))"
    loaded = {name.partition(".")[0] for name in json.loads(fresh(code, tmp_path))}
    assert package in loaded
    assert loaded.isdisjoint(HEAVY)
    assert loaded.isdisjoint(set(PACKAGES) - MAY_IMPORT[package])


def test_the_stores_side_of_a_worker_and_the_planner_load_no_torch_and_nothing_that_only_readers_need(
    tmp_path: Path,
) -> None:
    modules = "workers, workers.replica, workers.text.rows, jobs.capturing.planner, jobs.capturing.local, jobs.capture"
    loaded = {name.partition(".")[0] for name in fresh(f"import sys, {modules}\nprint(*sys.modules)", tmp_path).split()}
    assert {"workers", "jobs", "store"} <= loaded
    assert loaded.isdisjoint({"torch", "transformers", "ray", "xarray", "dask"})


def test_nothing_is_imported_from_a_folder_that_is_no_package_of_ours() -> None:
    """Apart from the top-level packages, the tests and the Sphinx settings, the checkout has no importable code."""
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py")}
    assert folders == {*PACKAGES, "tests", "docs"}


# --- Scripts --------------------------------------------------------------------------------------------------


def test_the_scripts_are_found() -> None:
    assert {"capture", "status", "demo"} <= set(SCRIPTS)


def started(
    form: str, script: str, arguments: list[str], cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A script started as by a user, without PYTHONPATH unless it is a module elsewhere."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    if form == "module":
        environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [*FORMS[form](script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HUNG_S
    )


def roots(names: Iterable[str]) -> set[str]:
    """Top-level packages that do not come with Python."""
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def imports_told(stderr: str) -> list[str]:
    """The modules that Python reports as imported, if there is no other output."""
    told = re.findall(r"^import time:.*\| *(\S.*)$", stderr, re.MULTILINE)
    assert len(told) == len(stderr.splitlines()), stderr
    assert told.pop(0) == "imported package"
    return told


@pytest.mark.parametrize("form", FORMS)
def test_help_is_given_from_any_folder_and_loads_nothing_that_is_installed(form: str, tmp_path: Path) -> None:
    told = {"PYTHONPROFILEIMPORTTIME": "1"}
    nothing = subprocess.run([sys.executable, "-c", ""], env=os.environ | told, capture_output=True, text=True)
    always = roots(imports_told(nothing.stderr))  # by the virtual environment itself
    always |= {"org"}  # Jython's, which Python's own pickle looks for
    for script in SCRIPTS:
        done = started(form, script, ["--help"], tmp_path, **told)
        loaded = imports_told(done.stderr)
        assert done.returncode == 0
        assert "jobs.console.starting" in loaded
        assert roots(loaded) - always == {"jobs"}, script
        assert f"usage: python jobs/{script}.py" in done.stdout
    assert list(tmp_path.iterdir()) == []


TYPOS = {
    "capture": (["--sequence-lenght", "8"], "--sequence_length"),
    "resubmit": (["--adress", "x", "--", "python"], "--address"),
    "status": (["store.zarr", "--veryfi"], "--verify"),
    "report": (["store.zarr", "--outptu", "x"], "--output"),
    "compare": (["s.zarr/a", "s.zarr/b", "--alow-incomplete"], "--allow_incomplete"),
    "query": (["s.zarr", "--tokne", "x"], "--token"),
    "explore": (["s.zarr", "--prot", "1"], "--port"),
    "validate": (["m", "--gihtub", "x"], "--github"),
    "quantize": (["tiny", "out", "--quantisation", "nf4"], "--quantization"),
    "import_routes": (["--fromat", "vllm"], "--format"),
    "doctor": (["s.zarr/a", "--agianst", "s.zarr/b"], "--against"),
    "card": (["s.zarr", "--licnese", "mit"], "--license"),
    "train_tiny": (["out", "--setps", "3"], "--steps"),
    "importance": (["--sample-tokns", "3"], "--sample_tokens"),
    "steer": (["s.zarr/a", "s.zarr/b", "--expretz", "3"], "--experts"),
}


def test_an_option_with_a_typo_is_a_line_that_names_the_one_that_was_meant_before_anything_slow_is_loaded(
    tmp_path: Path,
) -> None:
    code = f"""
import importlib, json, sys
told = {{}}
for script, arguments in { ({script: TYPOS[script][0] for script in COMMANDS})!r}.items():
    try:
        importlib.import_module(f"jobs.{{script}}").main(arguments)
    except ValueError as error:
        told[script] = str(error)
print(json.dumps([told, sorted(sys.modules)]))
"""
    told, loaded = json.loads(fresh(code, tmp_path))
    for script in COMMANDS:
        arguments, meant = TYPOS[script]
        wrong = next(part for part in arguments if part.startswith("--"))
        about = f"unknown option {wrong}: did you mean {meant}? python jobs/{script}.py --help lists the options"
        assert told[script] == about
    assert roots(loaded).isdisjoint({*HEAVY, "numba", "scipy", "xarray", "dask", "pandas", "altair"})
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    for script, arguments, line in (
        ("capture", ["--local"], "error: give at least one --dataset"),
        ("status", ["none.zarr"], "error: no store at none.zarr (no such folder)"),
    ):
        done = started("script", script, arguments, tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(line)
        assert done.stderr.count("\n") == 1
