"""Resolve a `--dataset` specification to documents.

The search order is: an alias (`wikitext-103`), an existing path or glob, a demo text (`demo:prose`), a hub id
(`org/name[:config]`). Promises: errors are reported here, before any work, if possible: a path that cannot be read, a
split or column that does not exist. Does not tokenize and does not know the store.
"""

import os
import re
from pathlib import Path

from jobs.sources.compressed import OPENERS
from jobs.sources.demo import DEMO_TEXTS, demo_source
from jobs.sources.documents import Document, Source
from jobs.sources.files import is_glob, local_source
from jobs.sources.formats import described, is_file_name
from jobs.sources.hub import hub_source, wikitext_source
from jobs.sources.splits import DEFAULT_SPLIT
from jobs.sources.wikitext import CONFIGS

__all__ = ["Document", "Source", "group_name", "resolve_source"]

HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<config>[\w.-]+))?", re.ASCII)


def resolve_source(
    spec: str, *, split: str | None = None, text_field: str | None = None, revision: str | None = None
) -> Source:
    """Find a data set and return its source.

    Parameters
    ----------
    spec
        Alias, path, glob, demo text or hub id.
    split
        Part of a data set that has several; `train` if not given.
    text_field
        Column that holds the text; by default `text`, otherwise the only plausible one.
    revision
        Branch, tag or commit of a hub data set; by default its main branch.

    Raises
    ------
    ValueError
        When nothing is found, or an option does not apply; the message says what was tried and what to do.
    """
    path = os.path.expanduser(spec)
    if spec in CONFIGS:
        return wikitext_source(spec, split=split, text_field=text_field, revision=revision)
    if "://" in spec and not os.path.lexists(path):
        raise ValueError(f"no data set {spec!r}: URLs are not supported; download the file and use its path")
    if os.path.lexists(path) or is_glob(path):
        refuse_option(spec, "revision", revision)
        return local_source(path, name=group_name(spec), split=split, field=text_field)
    if spec in DEMO_TEXTS:
        refuse_option(spec, "revision", revision)
        refuse_option(spec, "split", None if split == DEFAULT_SPLIT else split)
        refuse_option(spec, "text_field", text_field)
        return demo_source(spec)
    hub_id = HUB_ID.fullmatch(spec)
    if hub_id is None or is_file_name(spec):
        raise ValueError(
            f"no data set {spec!r}: there is no readable path {os.path.abspath(path)}, and it is not one of the "
            f"aliases {', '.join(CONFIGS)}, the demo texts {', '.join(DEMO_TEXTS)}, or a hub id "
            "org/name[:config]. For a local file, folder or glob, use its path, such as ./texts/book.txt; files are"
            f" read as {described()}"
        )
    return hub_source(
        hub_id["repository"],
        hub_id["config"],
        name=group_name(spec),
        split=split,
        text_field=text_field,
        revision=revision,
    )


def refuse_option(spec: str, option: str, value: str | None) -> None:
    """Raise for an option that this kind of data set does not have."""
    if value is not None:
        raise ValueError(f"--{option} {value} does not apply to {spec}, which has none")


def group_name(spec: str) -> str:
    """Return the default name of a data set's group in the store, of `[a-z0-9._-]`.

    An alias or demo text is its own name, a hub id gives `name[-config]`, a path its last part without extension or, if
    that has no usable character (`texts/*.txt`), the part before it.
    """
    path = os.path.expanduser(spec)
    is_local = os.path.lexists(path) or is_glob(path)
    if not is_local:
        return usable(spec.rpartition("/")[2]) or "data"
    last = os.path.abspath(path)
    if not os.path.isdir(path):
        last = re.sub(rf"\.[A-Za-z][A-Za-z0-9]*({'|'.join(map(re.escape, OPENERS))})?$", "", last)
    return next(filter(None, map(usable, reversed(Path(last).parts))), "data")


def usable(part: str) -> str:
    """Return a part of a path as a group name, empty if nothing is left; Zarr reserves a leading `__`."""
    return re.sub(r"[^a-z0-9._-]+", "-", part.lower()).strip("-").lstrip("._-")
