"""Which experts contribute least, as one JSON file for other programs.

No released tool reads saliencies from a file without pickle: REAP keeps its own with `torch.save`
(CerebrasResearch/reap, src/reap/observer.py). So the format is this project's own; `write_saliency` describes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr

from store.files import whole_file

Score = Literal["mean_saliency", "total_saliency", "largest_saliency", "mean_norm", "largest_norm"]
BESIDE = ("mean_saliency_low", "mean_saliency_high", "tokens")


def write_saliency(path: Path | str, found: Mapping[str, xr.Dataset], by: Score = "mean_saliency") -> None:
    """Write the experts of each layer in order of their contribution, with their scores.

    One JSON object: `format` is "expert-atlas saliency 1"; `by`, `definition`, `source` and `level` say what the scores
    are; `data_sets` has an object for each data set. In it, `n` is the number of its tokens, and `experts` maps each
    layer, by the model's own number, to its expert ids, from the least to the most salient; experts that no token chose
    come first. The other keys have the same layers, and lists in the order of `experts`: all scores by their names,
    `mean_saliency_low` and `mean_saliency_high`, the ends of the interval, and `tokens`. Unknown values are null.

    Parameters
    ----------
    path : Path or str
        The file; it is replaced atomically.
    found : mapping of str to xr.Dataset
        From `analysis.saliency`, by data set.
    by : str
        The score by which experts are ordered.

    Raises
    ------
    ValueError
        When there is no such score, or no data set.
    """
    if by not in get_args(Score):
        raise ValueError(f"unknown by={by!r}: choose from {', '.join(get_args(Score))}")
    if not found:
        raise ValueError("no data set: pass the results of analysis.saliency by name")
    about = {name: next(iter(found.values())).attrs[name] for name in ("definition", "source", "level")}
    data_sets = {name: _ordered(each, by) for name, each in found.items()}
    text = json.dumps({"format": "expert-atlas saliency 1", "by": by, **about, "data_sets": data_sets}, indent=1)
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _ordered(found: xr.Dataset, by: Score) -> dict[str, Any]:
    """One data set's experts and scores."""
    found = found.transpose("layer", "expert")
    order = np.argsort(found[by].fillna(-np.inf).values, axis=1, kind="stable")
    names = (*get_args(Score), *BESIDE)
    columns = {"experts": np.broadcast_to(found["expert"].values, order.shape), **{n: found[n].values for n in names}}
    layers = found["layer"].values.tolist()
    return {"n": int(found.attrs["n"])} | {
        name: {
            str(layer): [None if value != value else value for value in row]
            for layer, row in zip(layers, np.take_along_axis(values, order, 1).tolist(), strict=True)
        }
        for name, values in columns.items()
    }
