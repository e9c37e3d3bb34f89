"""The parts of the documentation pages: blocks of code, commands, links and headings.

A block of ```python or ```bash is executed by `tests/test_docs.py`. A block that cannot be executed there has a second
word that says why: code hosts and Sphinx read only the first word.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from myst_parser.slugs import github_slugify

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = (page for page in ROOT.glob("docs/**/*.md") if "_build" not in page.parts)
PAGES = sorted([*ROOT.glob("*.md"), *WRITTEN, ROOT / "workers" / "tiny-mixtral" / "README.md"])
REASONS = ("gpu", "cluster", "hub", "aws", "long")
"""Second words: needs a GPU, a cluster, a hub of models or data, a cloud; `long`: another test executes it."""
PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """Code of a page: its language, the reason why it is not executed, if any, and where it starts."""

    language: str
    reason: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The Python and shell blocks of a page, in order."""
    tokens = PARSER.parse(page.read_text(encoding="utf-8"))
    found = [
        Block(*f"{token.info} ".split(" ", 1), token.content, token.map[0] + 1)
        for token in tokens
        if token.type == "fence" and token.map and token.info.split(" ")[0] in ("python", "bash")
    ]
    return [Block(block.language, block.reason.strip(), block.text, block.line) for block in found]


def commands(text: str) -> list[str]:
    """The commands of a shell block, each on one line; trailing comments are kept."""
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip(" \n") and line[0] != "#"]


def script_of(command: str) -> tuple[str, list[str]] | None:
    """The script that a command runs, relative to the root, and its arguments; None for other programs."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*|ray|job|submit|--|--working-dir|\.", words[0]):
        words = words[1:]
    match words:
        case ["expert-atlas" | ".venv/bin/expert-atlas", name, *rest] if name[0] != "-":
            return f"jobs/{name.replace('-', '_')}.py", rest
        case ["python" | ".venv/bin/python", "-m", module, *rest]:
            return f"{module.replace('.', '/')}.py", rest
        case ["python" | ".venv/bin/python", script, *rest]:
            return script, rest
    return None


def links(page: Path) -> Iterator[str]:
    """The targets of a page's links and pictures, without addresses of other hosts."""
    for token in _inline(page):
        for child in token.children or []:
            target = str(child.attrs.get("href") or child.attrs.get("src") or "")
            if target and not re.match(r"[a-z]+:", target):
                yield target


def anchors(page: Path) -> set[str]:
    """The addresses of a page's headings."""
    tokens = PARSER.parse(page.read_text(encoding="utf-8"))
    heads = [inline for head, inline in pairwise(tokens) if head.type == "heading_open"]
    texts = ("".join(child.content for child in head.children or []) for head in heads)
    return {github_slugify(text) for text in texts}


def _inline(page: Path) -> list[Token]:
    return [token for token in PARSER.parse(page.read_text(encoding="utf-8")) if token.type == "inline"]
