"""A random sample of a data set's documents, of about so many tokens: the same for the same seed.

Documents are drawn without replacement, each as likely as every other one, and keep their order. How many are taken
follows from their lengths in characters, and from how many characters the tokens of the first ones have: the sample
is tokenized once only, when it is planned.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice

import numpy as np

from jobs.sources.documents import Document, Source

MEASURED = 64  # documents of which characters a token are counted (arbitrary)

Tokens = Callable[[Document], int]
"""How many tokens a document has; 0 where it cannot be rendered."""


def sampled(source: Source, tokens: int, seed: int, tokens_of: Tokens, limit_tokens: int | None = None) -> Source:
    """A source of some of another's documents.

    Parameters
    ----------
    tokens
        About so many in all.
    seed
        Of the draw.
    tokens_of
        Of a document, at most `limit_tokens`.
    limit_tokens
        So many tokens of a document count at most.
    """
    chosen = lru_cache(maxsize=1)(partial(_chosen, source, tokens, seed, tokens_of, limit_tokens))
    identity = lambda: {**source.identity, "sample_tokens": tokens, "seed": seed}
    return replace(source, read=partial(_read, source, chosen), identify=identity, published_documents=None)


def _read(source: Source, chosen: Callable[[], frozenset[int]], start: int) -> Iterator[Document]:
    wanted = chosen()
    found = (document for number, document in enumerate(source.read(0)) if number in wanted)
    return islice(found, start, None)


def _chosen(source: Source, tokens: int, seed: int, tokens_of: Tokens, limit_tokens: int | None) -> frozenset[int]:
    """The numbers of the sampled documents; one at least."""
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
