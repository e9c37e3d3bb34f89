"""A random sample of a data set's documents with about a given number of tokens, the same for the same seed.

Documents are drawn without replacement with equal probability, and keep their order. Their number follows from their
lengths in characters and from the characters per token of the first ones, so the sample is tokenized only once, when it
is planned.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice

import numpy as np

from jobs.sources.documents import Document, Source

MEASURED = 64  # documents used to measure characters per token (arbitrary)

Tokens = Callable[[Document], int]
"""The number of tokens of a document; 0 if it cannot be rendered."""


def sampled(source: Source, tokens: int, seed: int, tokens_of: Tokens, limit_tokens: int | None = None) -> Source:
    """A source with some of another source's documents.

    Parameters
    ----------
    tokens
        Approximate number of tokens in total.
    seed
        Seed of the draw.
    tokens_of
        The number of tokens of a document, at most `limit_tokens`.
    limit_tokens
        The most tokens of a document that are counted.
    """
    chosen = lru_cache(maxsize=1)(partial(_chosen, source, tokens, seed, tokens_of, limit_tokens))
    identity = lambda: {**source.identity, "sample_tokens": tokens, "seed": seed}
    return replace(source, read=partial(_read, source, chosen), identify=identity, published_documents=None)


def _read(source: Source, chosen: Callable[[], frozenset[int]], start: int) -> Iterator[Document]:
    wanted = chosen()
    found = (document for number, document in enumerate(source.read(0)) if number in wanted)
    return islice(found, start, None)


def _chosen(source: Source, tokens: int, seed: int, tokens_of: Tokens, limit_tokens: int | None) -> frozenset[int]:
    """The numbers of the sampled documents; at least one."""
    characters, known_characters, known_tokens = [], 1, 1
    for number, document in enumerate(source.read(0)):
        characters.append(document.characters)
        if number < MEASURED and (counted := tokens_of(document)) and counted != limit_tokens:
            known_characters += document.characters
            known_tokens += counted
    about = np.array(characters, float) * known_tokens / known_characters
    if limit_tokens is not None:
        about = np.minimum(about, limit_tokens)
    order = np.random.default_rng(seed).permutation(len(about))
    many = int(np.searchsorted(np.cumsum(about[order]), tokens)) + 1
    return frozenset(order[:many].tolist())
