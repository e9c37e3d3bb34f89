"""Which data set a document looks like, by its experts alone.

Each document is scored with tables counted on other documents: documents are split into halves by a hash of their ids,
and each half is scored with the tables of the other half.

Promises: constant memory except for one number for each document and data set; the same result in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.contrast import refuse_incomparable
from analysis.metrics.load import ExpertCounts
from analysis.scanning import Array, Block, Reducer, State, kernel, scan
from analysis.statistics.parts import Belongs, Parts, halves

UNIT = 2.0**-20  # bits; logarithms are rounded to multiples of it, so that sums are exact in any order
DEFINITION = "score = sum over tokens, layers and choices of log2 of the data set's share of the expert / tokens"
PRIOR = 0.5  # added to each count, so that unseen choices are not impossible (Krichevsky & Trofimov 1981)


class DocumentScores(Reducer):
    """Log-likelihoods of each document's choices under given tables.

    Parameters
    ----------
    tables : int64 array, shape (2, candidates, layers, experts)
        Logarithms in units of `UNIT` bits; the first table is for documents of the first half.
    split : callable
        Says which documents are in the first half.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"document_id"})

    def __init__(self, tables: Array, split: Belongs) -> None:
        self.tables, self.split = tables, split

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `score` (document, candidate) and `tokens` (document)."""
        documents = dataset.sizes["document"]
        return {
            "score": np.zeros((documents, self.tables.shape[1]), np.int64),
            "tokens": np.zeros(documents, np.int64),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        document = block["document_id"].astype(np.int64)
        table = 1 - self.split(document)[0].astype(np.int64)
        _add(block["expert"], block["counted"], document, table, self.tables, state["score"], state["tokens"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Scores of the documents with a counted token, in bits per token."""
        seen = np.flatnonzero(state["tokens"])
        score = state["score"][seen] * UNIT / state["tokens"][seen, None]
        return described(
            xr.Dataset(
                {"score": (("document", "candidate"), score), "tokens": ("document", state["tokens"][seen])},
                coords={"document_id": ("document", seen)},
            ),
            n=len(seen),
            counted="documents",
            estimator="mean over a document's tokens",
            null="none: only for comparing candidates",
            definition=DEFINITION,
            source="naive Bayes",
        )


def document_scores(
    captures: Mapping[str, xr.Dataset],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Which data set a document comes from, judged by its experts alone.

    Parameters
    ----------
    captures : mapping of str to xr.Dataset
        Two or more captures of one model, by name.
    threads, progress
        See `analysis.scan`; each capture is read twice.

    Returns
    -------
    xr.Dataset
        Over document, of all captures: `score` float64 (document, candidate), the log-likelihood of its choices in each
        data set, in bits per token, with layers and choices treated as independent (for comparison only, not a
        probability); `tokens` int64 and `likeliest` str, a name (document); coordinates `data_set`, its origin, and
        `document_id` in it. float64 (candidate): `right`, the share of the data set's documents for which it is the
        most likely one, null 1 / number of data sets; `auc`, how often one of its documents has more evidence for it
        than a document of the others, null 0.5 (Mann & Whitney 1947); NaN if there is no document. These nulls hold for
        data sets of similar size: a table of few documents is less reliable, and documents of neither data set tend
        towards the larger one (12 against 400: `right` 0.11 and 0.82, `auc` 0.37). For data sets of different sizes,
        compare with a split of the larger one into parts of those sizes.

    Raises
    ------
    ValueError
        When there are fewer than two captures, they have different layers or experts, or one has too few documents.
    """
    refuse_incomparable(captures)
    ask = lambda name, reducer: scan(captures[name], [reducer], threads=threads, progress=progress)[0]
    return document_scores_by(list(captures), ask)


def document_scores_by(names: Sequence[str], ask: Callable[[str, Reducer], xr.Dataset]) -> xr.Dataset:
    """`document_scores`, with `ask` running a reducer on a data set given by name, by a scan or from kept answers."""
    splits = [partial(halves, seed=number + 1) for number in range(len(names))]
    logarithms = []
    for name, split in zip(names, splits, strict=True):
        whole, first = ask(name, Parts(ExpertCounts(), 1, split))["counts"].values
        if not (first.sum() and (whole - first).sum()):
            raise ValueError(f"{name} has too few documents: one of its halves is empty")
        likely = [(half + PRIOR) / (half + PRIOR).sum(-1, keepdims=True) for half in (whole - first, first)]
        logarithms.append(np.rint(np.log2(likely) / UNIT).astype(np.int64))
    tables = np.stack(logarithms, axis=1)
    found = []
    for name, split in zip(names, splits, strict=True):
        own = ask(name, DocumentScores(tables, split))
        found.append(own.assign_coords(data_set=("document", [name] * own.sizes["document"])))
    joined = xr.concat(found, "document", combine_attrs="drop").assign_coords(candidate=names)
    score, origin = joined["score"].values, joined["data_set"].values
    likeliest = np.array(names)[score.argmax(1)]
    right, auc = np.full(len(names), np.nan), np.full(len(names), np.nan)
    for number, name in enumerate(names):
        is_own = origin == name
        evidence = score[:, number] - np.delete(score, number, axis=1).max(1)
        if is_own.any():
            right[number] = (likeliest[is_own] == name).mean()
            auc[number] = _area(evidence[is_own], evidence[~is_own])
    return described(
        joined.assign(likeliest=("document", likeliest), right=("candidate", right), auc=("candidate", auc)),
        n=len(origin),
        counted="documents",
        null=f"right: {1 / len(names):.4g}; auc: 0.5",
        estimator=f"tables from the other half of the documents, with {PRIOR} added to each count",
        definition=DEFINITION,
        source="naive Bayes; Mann & Whitney 1947",
    )


def _area(own: Array, others: Array) -> float:
    """How often one of the first is larger than one of the others; ties count half."""
    if not len(others):
        return float("nan")
    ordered = np.sort(others)
    below, up_to = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
    return float((below + up_to).mean() / 2 / len(others))


@kernel
def _add(
    expert: Array, counted: Array, document: Array, table: Array, tables: Array, score: Array, tokens: Array
) -> None:
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        of_half, total = tables[table[row]], score[document[row]]
        for position in range(positions):
            if counted[row, position]:
                tokens[document[row]] += 1
                for candidate in range(total.size):
                    for layer in range(layers):
                        for k in range(choices):
                            total[candidate] += of_half[candidate, layer, expert[row, position, layer, k]]
