"""The split of a file according to its name, by the conventions of the hub."""

import re
from collections.abc import Mapping
from pathlib import Path

from jobs.sources.formats import TEXT, format_of

DEFAULT_SPLIT = "train"
KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Word in a name → the split that it denotes. Source: `datasets.data_files`, SPLIT_KEYWORDS."""
SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}")
"""A name such as `train_sft-00000-of-00002`, with any name of the split."""


def of_split(files: Mapping[str, Path], split: str | None, spec: str, *, asked_for: bool) -> dict[str, Path]:
    """Return the files of one split, or all files if no names of splits are found.

    Parameters
    ----------
    asked_for
        Whether the files were named by a glob, so that all of them may be read without `split`.

    Raises
    ------
    ValueError
        When there are several splits and none is chosen, or the chosen one does not exist; the message lists them.
    """
    of = {name: split_of(name) for name in files}
    splits = sorted({found for found in of.values() if found is not None})
    if split is None:
        # For plain texts, only complete folders of splits count: programs and books may have such names for other
        # reasons.
        meant = None not in of.values() or any(format_of(path) is not TEXT for path in files.values())
        if len(splits) > 1 and meant and not asked_for:
            raise ValueError(
                f"{spec} has several splits: {', '.join(splits)}; choose one with --split, or use a glob such as "
                "'folder/**/*.parquet' for all of them"
            )
        return dict(files)
    if not splits and split == DEFAULT_SPLIT:
        return dict(files)
    if not splits:
        raise ValueError(f"{spec} has no splits, so --split {split} does not apply; name the files of the split")
    wanted = split if split in splits else KEYWORDS.get(split, split)
    if wanted not in splits:
        raise ValueError(f"{spec} has no split {split!r}; choose with --split from: {', '.join(splits)}")
    return {name: path for name, path in files.items() if of[name] == wanted}


def split_of(name: str) -> str | None:
    """Return the split denoted by a file's name, otherwise by one of its folders, the innermost first; None for
    none."""
    for part in reversed(name.split("/")):
        if shard := SHARD.match(part):
            return KEYWORDS.get(shard["split"], shard["split"])
        found = {KEYWORDS[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in KEYWORDS}
        if len(found) == 1:
            return found.pop()
    return None
