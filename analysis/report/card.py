"""A data set card for a shared store: README.md with a YAML header, as read by the Hugging Face hub.

Promises: everything about captures comes from their own metadata. The user gives the licence and the address of the
store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from analysis.report.command import command, versions
from store.coverage import Coverage
from store.identity import changes_in_words

TAGS = ("mixture-of-experts", "expert-routing", "interpretability", "zarr")
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
"""The hub's size categories, here for numbers of documents."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """One capture of a store."""

    name: str
    state: Coverage
    attrs: Mapping[str, Any]
    """From `store.attributes`."""
    arrays: Sequence[str]
    """The names of its arrays."""


def card(captures: Sequence[Shared], *, title: str, licence: str, address: str, report: str | None = None) -> str:
    """The text of a card.

    Parameters
    ----------
    captures
        The captures of the store.
    title
        The name of the data set.
    licence
        In the hub's notation, such as cc-by-4.0. It covers the routes and the tokens, from which the text can be read
        back.
    address
        Where the store will be, in the form that xarray opens: hf://datasets/organization/name.
    report
        The report's file next to the card.

    Returns
    -------
    str
        Markdown with a YAML header.
    """
    documents = sum(each.state.plan.documents for each in captures)
    size = next((words for most, words in SIZES if documents < most), "n>10M")
    front = {"license": licence, "pretty_name": title, "size_categories": [size], "tags": list(TAGS), "viewer": False}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {_line(title)}\n",
        "The experts that a mixture-of-experts language model chose for every token, and their weights where these are"
        " known, as a Zarr store of Expert Atlas. The text can be read back from the tokens.\n",
        _reading(captures, address),
        *(_about(each) for each in captures),
    ]
    if report is not None:
        parts.insert(3, f"[{report}]({report}) shows what the experts did, on one page that works offline.\n")
    return "\n".join(parts)


def _reading(captures: Sequence[Shared], address: str) -> str:
    return (
        "```python\nimport xarray as xr\n\n"
        f'routes = xr.open_zarr("{address}", group="{captures[0].name}", consolidated=False)\n'
        "print(routes.expert.sizes, (routes.expert[:64, :, 0, 0] == 0).sum().compute())\n```\n\n"
        "The value 255 (65,535 if there are more than 255 experts) means that there is no expert: padding, or a token"
        " whose routes are not known.\n"
    )


def _about(each: Shared) -> str:
    """One capture: a table, and how it was made."""
    attrs, plan = each.attrs, each.state.plan
    complete = "complete" if each.state.complete else f"incomplete: {len(each.state.missing):,} shards are missing"
    layers = attrs.get("layers", [])
    rows = {
        "model": attrs.get("model", "not stated"),
        "revision": attrs.get("model_revision", "not stated"),
        "quantization": attrs.get("quantization", "not stated"),
        **({"changed": changes} if (changes := changes_in_words(attrs)) else {}),
        "tokens": f"{each.state.tokens_done:,} of {plan.documents:,} documents, in {plan.rows:,} rows; {complete}",
        "routes": f"{attrs['experts_per_token']} of {attrs['num_experts']} experts at {len(layers)} layers"
        f" ({layers[0]} to {layers[-1]})",
        "arrays": ", ".join(f"`{name}`" for name in each.arrays),
        "tokenizer": f"SHA-256 {_hash(attrs)}",
        "digest": f"`{each.state.digest}`",
    }
    table = "\n".join(f"| {name} | {_line(value)} |" for name, value in rows.items())
    return f"## {each.name}\n\n| | |\n|---|---|\n{table}\n\n{_origin(attrs)}\n"


def _hash(attrs: Mapping[str, Any]) -> str:
    return str(attrs.get("identity", {}).get("tokenizer") or attrs.get("tokenizer") or "not known")


def _origin(attrs: Mapping[str, Any]) -> str:
    """How a capture was made."""
    if imported := attrs.get("imported"):
        files = "\n".join(f"- {_line(file['name'])}, SHA-256 {file['sha256']}" for file in imported["files"])
        order = attrs.get("order_of_choices", "not stated")
        return (
            f"Imported from {imported['engine']} (version: {_line(imported['engine_version'])}), in the form"
            f" {imported['format']}; a token's choices are in this order: {order}. The files were:\n\n{files}"
        )
    if told := command(attrs):
        return f"Captured with {_line(versions(attrs))}:\n\n```bash\n{told}\n```"
    return "The capture does not record how it was made."


def _line(text: object) -> str:
    """A text for a table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
