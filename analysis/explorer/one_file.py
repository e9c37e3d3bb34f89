"""Documents with their routes as one file, for a paper's web page; and the environment of the explorer's templates.

Promises: the file makes no network requests, runs only its own script, and holds the experts exactly and the weights to
1/65,535 of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from analysis.escaping import inert_json, policy_hash
from analysis.explorer.document import whole
from analysis.explorer.pieces import inline
from analysis.explorer.view import View

FOLDER = Path(__file__).parent / "pages"
MOST_TOKENS = 100_000  # in one file: 27 MB for Mixtral (arbitrary)


def environment() -> jinja2.Environment:
    """The explorer's templates: everything is escaped, and `inline` turns a text into one visible line."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["inline"] = inline
    return made


def reader_data(view: View, documents: Sequence[dict[str, Any]]) -> Markup:
    """The data from which explorer.js draws a text: documents as `analysis.explorer.document` returns them."""
    shape = {"layers": view.layers, "experts": view.experts, "choices": view.choices, "words": len(view.texts)}
    shape["distributions"], shape["indented"] = view.scores is not None, view.indented
    return inert_json({**shape, "documents": list(documents)})


def export_page(view: View, documents: Sequence[int]) -> str:
    """One HTML file with some whole documents of a capture.

    Raises
    ------
    ValueError
        When there is no such document, or they are too long in total.
    """
    documents = list(dict.fromkeys(documents))
    refuse_too_long(view, documents)
    texts = [whole(view, document) for document in documents]
    for text in texts:
        text["name"] = inline(text["name"]) or "(no name)"
    tokens = sum(len(text["ids"]) for text in texts)
    style, script = ((FOLDER / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    attrs = view.capture.attrs
    return (
        environment()
        .get_template("export.html.jinja")
        .render(
            title=texts[0]["name"] if len(texts) == 1 else f"{len(texts)} texts of {view.dataset}",
            about=f"The experts that {attrs.get('model')} ({attrs.get('quantization')}) chose for each token of"
            f" {view.dataset}: {tokens:,} tokens, {len(view.layers)} layers of {view.experts} experts.",
            style=Markup(style),
            script=Markup(script),
            style_hash=policy_hash(style),
            script_hash=policy_hash(script),
            data=reader_data(view, texts),
        )
    )


def refuse_too_long(view: View, documents: Sequence[int]) -> None:
    """Raise a ValueError if documents do not fit into one file, or do not exist."""
    for document in documents:
        view.pages_of(document)
    tokens = int(view.document_tokens[0, list(documents)].sum())
    if tokens > MOST_TOKENS:
        raise ValueError(f"{len(documents)} documents with {tokens:,} tokens: one file holds at most {MOST_TOKENS:,}")
