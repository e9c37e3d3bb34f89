"""WikiText's articles, from its rows of one line each.

The published data sets contain lines, not articles. An article begins at a row ` = Title = ` that has an empty row (or
the end of the data) on both sides; section titles have more `=`. Rows are joined with nothing between them, so all
articles together are all rows together: no character is lost.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise

from jobs.sources.documents import Document

REPOSITORY = "Salesforce/wikitext"
CONFIGS = {"wikitext-2": "wikitext-2-raw-v1", "wikitext-103": "wikitext-103-raw-v1"}
"""Alias of a data set → its configuration in the repository."""
PUBLISHED_ARTICLES = {
    ("wikitext-2", "train"): 600,
    ("wikitext-2", "validation"): 60,
    ("wikitext-2", "test"): 60,
    ("wikitext-103", "train"): 28_475,
    ("wikitext-103", "validation"): 60,
    ("wikitext-103", "test"): 60,
}
"""Articles by alias and split, from Merity et al. (2016), "Pointer Sentinel Mixture Models", table 2."""

TITLE = re.compile(r" = ([^=\s](?:.*[^=\s])?) = \n?")
BEFORE_FIRST_TITLE = "(before the first title)"


def articles(rows: Iterable[tuple[str, bool]]) -> Iterator[Document]:
    """Yield one document per article, named by its title.

    Parameters
    ----------
    rows
        Each row's text, and whether something in it was replaced.
    """
    name, body, repaired, before = BEFORE_FIRST_TITLE, list[str](), False, ""
    for (row, row_repaired), (after, _) in pairwise(chain(rows, [("", False)])):
        title = TITLE.fullmatch(row)
        if title and not before.strip() and not after.strip():
            if "".join(body):
                yield Document(name=name, text="".join(body), repaired=repaired)
            name, body, repaired = title[1], [], False
        body.append(row)
        repaired = repaired or row_repaired
        before = row
    if "".join(body):
        yield Document(name=name, text="".join(body), repaired=repaired)
