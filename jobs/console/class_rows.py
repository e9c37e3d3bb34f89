"""The question of `jobs/query.py` about the experts of a token class: digits, words in capitals, a regular expression.

Promises: the table and the JSON output have the same rows. Does not know about the command line.
"""

from functools import partial
from typing import TYPE_CHECKING

from jobs.console.query_rows import Listed
from jobs.console.recorded_rows import Recorded
from jobs.console.tables import Facts

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr
    from numpy.typing import NDArray

FREQUENT = 10  # tokens of the class to list (arbitrary)
OF_EXPERT = ("share", "share_low", "share_high", "lift", "lift_low", "lift_high")


def class_question(which: str, capture: "xr.Dataset") -> Recorded:
    """What to count for a token class, and the function that makes the answer.

    Raises
    ------
    ValueError
        When there is no such class, or a regular expression is invalid.
    """
    from analysis.metrics.class_experts import ClassCounts
    from analysis.metrics.tokens import TokenCounts
    from analysis.statistics.jackknife import Jackknife
    from analysis.token_classes import members_of

    belongs = members_of(which, capture["piece"].values.tolist())
    return [TokenCounts(), Jackknife(ClassCounts({which: belongs}))], partial(class_answer, which, belongs)


def class_answer(
    which: str,
    belongs: "NDArray[np.bool_]",
    capture: "xr.Dataset",
    layers: list[int],
    tokens: "xr.Dataset",
    classes: "xr.Dataset",
) -> Listed:
    """The experts of a class, layer by layer, the most frequent first; experts without any are left out."""
    from analysis.metrics.class_experts import class_experts_of
    from analysis.token_classes import CLASSES

    found = class_experts_of(classes.sel(layer=layers)).squeeze("token_class", drop=True)
    facts = {
        "class": which,
        "description": CLASSES[which].description if which in CLASSES else "a regular expression",
        "tokens": int(found["tokens"]),
        "effective_documents": float(found["effective_documents"]),
        "most_frequent": _frequent(capture, tokens["tokens"].values, belongs),
        **found.attrs,
    }
    rows: list[Facts] = []
    for layer in layers if facts["tokens"] else ():
        own = found.sel(layer=layer)
        order = (-own["counts"]).argsort(kind="stable").values.tolist()
        rows += [_row(layer, own.isel(expert=expert)) for expert in order if own["counts"][expert]]
    title = f"{which} ({facts['description']}) in {capture.attrs['dataset']}: {_in_words(facts)}"
    return Listed(title=title, kind="classes", facts=facts, rows=rows, section="layer")


def _row(layer: int, own: "xr.Dataset") -> Facts:
    values = {name: own[name].item() for name in OF_EXPERT}
    return {"layer": layer, "expert": int(own["expert"]), "count": int(own["counts"]), **values}


def _frequent(capture: "xr.Dataset", tokens: "NDArray[np.int64]", belongs: "NDArray[np.bool_]") -> list[Facts]:
    """The most frequent tokens of the class."""
    order = (-tokens * belongs).argsort(kind="stable")[:FREQUENT]
    seen = [token for token in order.tolist() if tokens[token] and belongs[token]]
    return [
        {"token_id": token, "piece": str(capture["piece"].values[token]), "tokens": int(tokens[token])}
        for token in seen
    ]


def _in_words(facts: Facts) -> str:
    """How often the class occurs, the values expected by chance, and the intervals, or why there are none."""
    from analysis.statistics.jackknife import MIN_EFFECTIVE_DOCUMENTS

    often = " ".join(each["piece"] for each in facts["most_frequent"])
    said = f"{facts['tokens']:,} occurrences" + (f", most frequent: {often}" if often else "")
    said += f"; expected by chance: share {facts['null']:.4f}, lift 1"
    if not facts["tokens"]:
        return said
    if (effective := facts["effective_documents"]) >= MIN_EFFECTIVE_DOCUMENTS:
        return f"{said}; from and to: {facts['level']:.0%} interval of the lift"
    least = f"at least {MIN_EFFECTIVE_DOCUMENTS:g} are needed"
    return f"{said}; no intervals: the documents are worth {effective:.1f} of equal length, and {least}"
