"""README and the pages work: blocks and commands run, links have targets, every public name has its page."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import options_page
import pages
import pytest
import yaml
from pages import PAGES, REASONS, ROOT, Block

import analysis
import store
import workers
from jobs import capture, demo
from jobs.capturing.importance_options import parse_importance
from jobs.capturing.options import parse_capture
from jobs.console.arguments import parse

BLOCKS = {page: pages.blocks(page) for page in PAGES}
RUN = {page: [block for block in found if not block.reason] for page, found in BLOCKS.items()}
READ = {"capture": parse_capture, "importance": parse_importance}
LONG = {
    "jobs/capture.py": "tests/jobs/test_capture.py",
    "jobs/compare.py": "tests/jobs/test_compare.py",
    "jobs/demo.py": "tests/test_docs.py",
    "jobs/doctor.py": "tests/analysis/test_doctor.py",
    "jobs/explore.py": "tests/analysis/test_explore_browser.py",
    "jobs/import_routes.py": "tests/jobs/test_import_routes.py",
    "jobs/importance.py": "tests/jobs/test_importance_job.py",
    "jobs/query.py": "tests/jobs/test_query.py",
    "jobs/report.py": "tests/analysis/test_report.py",
    "jobs/steer.py": "tests/jobs/test_steer.py",
}
"""Scripts of blocks that take too long here or do not end, and the tests that run them."""
FEW = ("--limit_tokens", "96")
"""Tokens of each document of the demo: enough for every command to find something."""


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- Blocks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as created by `make demo`, with few tokens of each document."""
    folder = tmp_path_factory.mktemp("demo")
    for text, documents in demo.TEXTS.items():
        options = ["--dataset", text, "--limit_documents", str(documents), "--store", str(folder / "demo.zarr"), *FEW]
        assert capture.carry_out(parse_capture([*options, *demo.MODEL.split(), *demo.RECORD.split()])) == 0
    shutil.copy(ROOT / "README.md", folder)
    (folder / "demo.zarr.results").mkdir()
    return folder


@pytest.fixture
def folder(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, which is the working directory and the home folder; counted results are kept for the next page."""
    shutil.copytree(demo_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    shutil.copytree(tmp_path / "demo.zarr.results", demo_folder / "demo.zarr.results", dirs_exist_ok=True)


@pytest.mark.parametrize("page", [page for page in PAGES if RUN[page]], ids=named)
def test_the_blocks_of_a_page_run(
    page: Path, folder: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    for block in RUN[page]:
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
            continue
        for line in pages.commands(block.text):
            match pages.script_of(line):
                case None:
                    subprocess.run(["bash", "-ec", line], check=True)
                case script, arguments if script.startswith("jobs/"):
                    ran = command(*arguments, main=import_module(script[:-3].replace("/", ".")).main)
                    assert ran.status == 0, f"{named(page)}:{block.line}: {line}\n{ran.out}{ran.err}"
                case script, arguments:
                    monkeypatch.setattr(sys, "argv", [script, *arguments])
                    runpy.run_path(str(ROOT / script), run_name="__main__")


COMMANDS = [
    (named(page), block, line)
    for page, found in BLOCKS.items()
    for block in found
    if block.language == "bash"
    for line in pages.commands(block.text)
]


def test_a_block_that_is_not_executed_says_why() -> None:
    reasons = {(named(page), block.line): block.reason for page, found in BLOCKS.items() for block in found}
    assert {where: reason for where, reason in reasons.items() if reason not in ("", *REASONS)} == {}


def test_scripts_of_long_blocks_are_run_by_other_tests() -> None:
    ours = ((where, block, pages.script_of(line)) for where, block, line in COMMANDS)
    long = {(found[0], where) for where, block, found in ours if found and block.reason == "long"}
    assert {(script, where) for script, where in long if script not in LONG} == set()
    for script, test in LONG.items():
        assert Path(script).stem in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize(("where", "block", "line"), COMMANDS, ids=[f"{where}: {line}" for where, _, line in COMMANDS])
def test_the_options_of_a_command_exist(where: str, block: Block, line: str) -> None:
    for target in re.findall(r"^make ([a-z]+)", line):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    found = pages.script_of(line)
    if found and found[0].startswith("jobs/") and found[0] != "jobs/demo.py":
        script, own = Path(found[0]).stem, found[1]
        own = own[: own.index("--")] if "--" in own else own
        READ.get(script, lambda words: parse(options_page.config_of(script), script, words))(own)


# --- Links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_pictures_lead_to_files_and_headings_of_the_repository(page: Path) -> None:
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in pages.anchors(target), f"{target.name} has no heading #{anchor}"


# --- The Python API ---------------------------------------------------------------------------------------------------


def test_every_public_name_has_its_page_and_only_public_names_have() -> None:
    told = [name for page in (ROOT / "docs" / "api").glob("*.md") for name in api_names(page.read_text("utf-8"))]
    wanted = [f"{package.__name__}.{name}" for package in (store, analysis, workers) for name in package.__all__]
    assert sorted(told) == sorted(wanted)


def api_names(page: str) -> Iterator[str]:
    """The names that a page documents, each in the last module named before it."""
    module = ""
    for directive, value in re.findall(r"^\.\. ([a-z:]+):: (\w+)$", page, re.MULTILINE):
        if directive == "currentmodule":
            module = value
        else:
            yield f"{module}.{value}"


# --- Files that a code host reads -------------------------------------------------------------------------------------


def test_the_changelog_and_the_citation_are_of_the_project_s_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, date = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)[0]
    assert (cited["version"], cited["date-released"].isoformat()) == (newest, date)
    assert (newest, cited["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= cited.keys(), "what the format asks for"


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_s_form_asks_for_versions_and_the_status_of_the_store(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys(), "what the format asks for"
    asked = {field["id"]: field["attributes"] for field in form["body"] if field["type"] != "markdown"}
    assert "`expert-atlas --version`" in asked["versions"]["description"]
    assert "`expert-atlas status STORE --json`" in asked["status"]["description"]
