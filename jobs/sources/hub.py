"""Data sets from a hub: first resolved to a commit, then downloaded completely and read from the arrow cache.

Promises: the text is that of the named commit, even if the library would fall back to another copy in its cache. Token
and address come from the environment (`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`). Nothing that a repository holds is
executed.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.sources.arrow import dataset_table
from jobs.sources.columns import Table, table_documents
from jobs.sources.columns import text_field as chosen_field
from jobs.sources.documents import Document, Source, TextIdentity
from jobs.sources.splits import DEFAULT_SPLIT
from jobs.sources.wikitext import CONFIGS, PUBLISHED_ARTICLES, REPOSITORY, articles

COMMIT = re.compile("[0-9a-f]{40}")
TIMEOUT_S = 30.0
"""Timeout for the one small request that resolves a revision (arbitrary)."""


def hub_source(
    repository: str,
    config: str | None,
    *,
    name: str,
    split: str | None,
    text_field: str | None,
    revision: str | None,
) -> Source:
    """Return the source for a hub data set, one document per row."""
    split = split or DEFAULT_SPLIT
    table, commit = hub_table(repository, config, split, revision)
    field = chosen_field(table, text_field, repository)
    known: TextIdentity = {
        "data": repository,
        "config": config,
        "revision": commit,
        "split": split,
        "field": field.name,
        "document": "row",
    }
    return Source(
        name=name,
        read=partial(table_documents, table, field),
        identify=lambda: known,
        conversations=field.conversations,
    )


def wikitext_source(alias: str, *, split: str | None, text_field: str | None, revision: str | None) -> Source:
    """Return the source for one of WikiText's aliases, one document per article."""
    split = split or DEFAULT_SPLIT
    if (alias, split) not in PUBLISHED_ARTICLES:
        raise ValueError(f"{alias} has no split {split!r}; its splits: train, validation, test")
    if text_field not in (None, "text"):
        raise ValueError(f"{alias} keeps its text in the column 'text', so --text_field {text_field} does not apply")
    table, commit = hub_table(REPOSITORY, CONFIGS[alias], split, revision)
    known: TextIdentity = {
        "data": REPOSITORY,
        "config": CONFIGS[alias],
        "revision": commit,
        "split": split,
        "field": "text",
        "document": "article",
    }

    def read(start: int) -> Iterator[Document]:
        rows = ((row.values["text"] or "", row.repaired) for row in table.rows(0, ["text"]))
        return islice(articles(rows), start, None)

    published = PUBLISHED_ARTICLES[alias, split]
    return Source(name=alias, read=read, identify=lambda: known, published_documents=published)


def hub_table(repository: str, config: str | None, split: str, revision: str | None) -> tuple[Table, str]:
    """Download one split and return its rows and their commit.

    Raises
    ------
    ValueError
        When the hub does not answer or does not have it; the message says what was requested and what to do instead.
    """
    import datasets  # takes a second, and only needed for hub data sets
    from huggingface_hub import HfApi

    try:
        commit = revision if revision and COMMIT.fullmatch(revision) else None
        if commit is None:
            commit = HfApi().dataset_info(repository, revision=revision, timeout=TIMEOUT_S).sha
        data: Any = datasets.load_dataset(repository, config, split=split, revision=commit)
    except Exception as error:  # connection, permission, names: the libraries raise about twenty classes
        raise ValueError(
            f"cannot get the data set {repository} (config {config or 'default'}, split {split}, revision "
            f"{revision or 'main'}) from the hub: {type(error).__name__}: {error}\n"
            "There is no local path of that name either. Without a network, use the path of a local text, "
            "JSON-lines or parquet file instead; or, for a data set that is already in the cache, set "
            "HF_HUB_OFFLINE=1 and pass its commit as --revision. A private or gated data set needs a token "
            "with read access in HF_TOKEN."
        ) from error
    assert commit is not None
    check_commit(data, repository, commit)
    return dataset_table(data, split), commit


def check_commit(data: Any, repository: str, commit: str) -> None:
    """Raise for data of another commit: offline, the library uses the newest copy in its cache."""
    for file in data.cache_files:
        folder = Path(file["filename"]).parent.name
        if folder != commit:
            raise ValueError(
                f"the cache holds {repository} at commit {folder}, but {commit} was requested; "
                f"use --revision {folder}, or download the other one with a network"
            )
