"""Documents with their routes as one file, for a paper's web page; and what the explorer's pages are made with.

Promises: the file asks no host for anything, runs no script but its own, and holds the routes as they are: experts
exactly, weights to 1/65,535 of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from analysis.escaping import inert_json, policy_hash, visible
from analysis.view import View

FOLDER = Path(__file__).parent / "pages"
MOST_TOKENS = 200_000  # of one file: about 35 MB for Mixtral, which browsers still draw (arbitrary)


def environment() -> jinja2.Environment:
    """Templates of the explorer: everything is escaped, and `inline` makes one visible line of a text."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["inline"] = lambda text: visible(str(text).replace("\n", "↵"))
    return made


def reader_data(view: View, documents: Sequence[dict[str, Any]]) -> Markup:
    """What explorer.js draws a text from: documents as `View.document` gives them."""
    shape = {"layers": view.layers, "experts": view.experts, "choices": view.choices}
    return inert_json({**shape, "documents": list(documents)})


def export_page(view: View, documents: Sequence[int]) -> str:
    """One HTML file of some documents of a capture, whole.

    Raises
    ------
    ValueError
        When there is no such document, or they are too long together.
    """
    tokens = sum(int(view.document_tokens[0, document]) for document in documents if view.pages_of(document))
    if tokens > MOST_TOKENS:
        raise ValueError(f"{len(documents)} documents of {tokens:,} tokens: one file holds {MOST_TOKENS:,} at most")
    pages = [view.document(number, page) for number in documents for page in range(max(1, len(view.pages_of(number))))]
    for page in pages:
        if page["pages"] > 1:
            page["name"] = f"{page['name']}, from token {page['offset']}"
    style, script = ((FOLDER / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    attrs = view.capture.attrs
    return (
        environment()
        .get_template("export.html.jinja")
        .render(
            title=pages[0]["name"] or view.dataset
            if len(documents) == 1
            else f"{len(documents)} texts of {view.dataset}",
            about=f"The experts that {attrs.get('model')} ({attrs.get('quantization')}) chose for each token of"
            f" {view.dataset}: {tokens:,} tokens, {len(view.layers)} layers of {view.experts} experts.",
            style=Markup(style),
            script=Markup(script),
            style_hash=policy_hash(style),
            script_hash=policy_hash(script),
            data=reader_data(view, pages),
        )
    )
