"""Help pages and `expert-atlas`: they name exactly what scripts accept, and they fit on a screen."""

import platform
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import options_page
import pytest

from jobs.capturing.importance_options import parse_importance
from jobs.capturing.options import parse_capture
from jobs.console import command as atlas
from jobs.console import starting, versions
from jobs.console.arguments import parse
from jobs.console.command import commands

SCRIPTS = sorted(commands())
LINES, COLUMNS = 45, 100  # of a screen
Exits = Callable[..., tuple[int, str, str]]


def page(script: str) -> str:
    return str(import_module(f"jobs.{script}").__doc__)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Exits:
    """Runs `expert-atlas`: its status, its output and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expert-atlas", *arguments])
        monkeypatch.setattr(starting.Typed, "form", starting.Typed.form)  # restored at the end
        with pytest.raises(SystemExit) as ended:
            atlas.main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_fits_a_screen_and_has_a_line_for_the_list_of_commands_and_three_examples(script: str) -> None:
    lines = page(script).splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert page(script).isascii(), "some terminals know nothing else"
    assert lines[1] == ""
    assert lines[0].endswith((".", "three minutes.")), "a sentence"
    assert f"usage: python jobs/{script}.py" in page(script)
    assert "None" not in page(script)
    assert len(examples(script)) == (0 if script == "demo" else 3)


def examples(script: str) -> list[str]:
    told = page(script).partition("Examples:\n")[2].partition("\n\n")[0]
    return [line.strip() for line in told.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "demo"])
def test_a_page_names_every_option_and_nothing_else(script: str) -> None:
    known, of_capture = (
        {options_page.written(field, hint).split()[0]: field.default for field, hint, _ in options_page.options(config)}
        for config in map(options_page.config_of, (script, "capture"))
    )
    told = page(script).partition("Examples:")[2].partition("\n\n")[2]
    named = set(re.findall(r"--\w+", told))
    assert named - known.keys() - of_capture.keys() == set(), "no such option"
    assert {name for name in known if name.startswith("--")} - named == set(), "missing on the page"
    for name, default in re.findall(r"^  (--\w+) .*\((\d+)\)$", told, re.MULTILINE):
        assert known[name] == int(default)


READ = {"capture": parse_capture, "importance": parse_importance}


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "demo"])
def test_the_examples_of_a_page_are_read(script: str) -> None:
    for example in examples(script):
        words = shlex.split(example.removeprefix("ray job submit -- "))
        assert words[:2] == ["python", f"jobs/{script}.py"]
        own = words[2 : words.index("--")] if "--" in words else words[2:]
        if script in READ:
            assert READ[script](own).dataset
        else:
            parse(options_page.config_of(script), script, own)


def test_the_page_of_all_options_is_what_the_code_says() -> None:
    written = options_page.PAGE.read_text(encoding="utf-8")
    assert written == options_page.page(), "python tests/options_page.py writes it anew"
    assert "{None}" not in written


def test_expert_atlas_lists_every_script_with_its_line(exits: Exits) -> None:
    for asked in ([], ["--help"], ["-h"], ["help"]):
        status, out, err = exits(*asked)
        assert (status, err) == (0, "")
        for script in SCRIPTS:
            assert re.search(rf"^  {script} +{re.escape(page(script).splitlines()[0])}$", out, re.MULTILINE)
        assert len(out.splitlines()) <= LINES


def test_expert_atlas_runs_a_script_and_says_its_own_name(exits: Exits, tmp_path: Path) -> None:
    status, out, err = exits("import-routes", "--help")
    assert (status, err) == (0, "")
    assert "usage: expert-atlas import_routes FILES" in out
    status, out, err = exits("status", str(tmp_path), "--vrify")
    assert (status, out) == (2, "")
    assert err == "error: unknown option --vrify: did you mean --verify? expert-atlas status --help lists the options\n"
    status, out, _ = exits("capture", "--help")
    assert "  expert-atlas capture --local" in out
    assert "  ray job submit -- python jobs/capture.py" in out, "where nothing is installed"


def test_expert_atlas_names_the_command_that_was_meant(exits: Exits) -> None:
    assert exits("reprot") == (
        2,
        "",
        "error: unknown command 'reprot': did you mean report? expert-atlas --help lists them\n",
    )
    assert exits("--zzz")[2] == "error: unknown command '--zzz': expert-atlas --help lists them\n"


def test_the_versions_are_those_that_are_installed_and_in_a_clone_that_of_the_project(
    exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"torch": "2.15.0", "transformers": "5.23.0", "bitsandbytes": "0.50.2", "zarr": "3.4.2"}

    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", version)
    project = tomllib.loads((options_page.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own, packages = exits("--version")[1].splitlines()
    assert own == f"expert-atlas {project['version']}"
    assert packages == (
        f"Python {platform.python_version()}, torch 2.15.0, transformers 5.23.0, bitsandbytes 0.50.2, "
        "ray not installed, zarr 3.4.2, xarray not installed"
    )
    installed["expert-atlas"] = "9.9"
    assert exits("--version")[1].startswith("expert-atlas 9.9\n")


def test_the_package_installs_the_command_and_make_installs_the_package() -> None:
    root = options_page.ROOT
    scripts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"expert-atlas": f"{atlas.__name__}:{atlas.main.__name__}"}
    made = (root / "Makefile").read_text(encoding="utf-8")
    assert "\ndemo: $(BIN)/expert-atlas\n" in made
    assert "--no-deps --no-build-isolation --editable ." in made, "nothing is fetched that is not locked"


def test_a_command_can_be_copied_to_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    typed = starting.command_line("report", tmp_path / "my store.zarr", "--top", 3)
    assert typed == ".venv/bin/python jobs/report.py 'my store.zarr' --top 3"
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert starting.command_line("report", "s3://b/s") == "python jobs/report.py s3://b/s"
    monkeypatch.setattr(starting.Typed, "form", r"expert-atlas \1")
    assert starting.command_line("report", "s") == "expert-atlas report s"
