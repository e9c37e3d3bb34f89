"""The top of the page: what the report covers, three sentences to paste, and the commands behind them.

Promises: the sentences say what `analysis.report.headline` finds beyond chance, or that it finds nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

import xarray as xr

from analysis.escaping import visible
from analysis.report.command import command
from analysis.report.figures import Figure
from analysis.report.headline import busiest, compared_in, specialist, token_finding
from analysis.report.section import Answers, Finding
from store.identity import changes_in_words

TINY = "tiny-mixtral"
"""The name of the model that comes with the code, in captures."""
_SHORT = 12  # characters of a commit or fingerprint that identify it


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The text to paste."""

    findings: Sequence[Finding]
    """Three: what was measured, the clearest specialist or the busiest expert, and a token. Only one if there is no
    token."""
    figure: int | None
    """The chart that shows the second one, by its index on the page."""
    commands: Sequence[str]
    """The commands that make the data of the second one and the report again."""


def summary(
    answers: Sequence[Answers], apart: xr.Dataset | None, figures: Sequence[Figure], again: str | None
) -> Summary:
    """The summary of a page; `again` is the report's own command."""
    captured = [each for each in answers if each["load"].attrs["n"]]
    measured = _measured(answers, captured)
    if not captured:
        return Summary(findings=[measured], figure=None, commands=[again] if again else [])
    main = main_finding(captured, apart)
    token = token_finding(captured) or Finding(said="No token goes to an expert more often than its documents explain.")
    assert main.of is not None  # it is one data set's
    names = [figure.name for figure in figures]
    pictures = (f"{kind}-{main.of.label}" for kind in ("domains", "load"))
    picture = next((names.index(name) for name in pictures if name in names), None)
    commands = [told for told in (command(main.of.attrs), again) if told]
    return Summary(findings=[measured, main, token], figure=picture, commands=commands)


def main_finding(captured: Sequence[Answers], apart: xr.Dataset | None) -> Finding:
    """The clearest specialist of all data sets or, if none is beyond chance, the busiest expert."""
    compared = compared_in(captured, apart)
    found = [one for each in compared if apart is not None and (one := specialist(each, apart))]
    if not found:
        return busiest(compared or captured[:1])
    best, _ = max(found, key=lambda one: one[1])
    assert best.of is not None  # set by `specialist`
    said = f"The clearest specialist, for {best.of.label} ({best.of['load'].attrs['n']:,} tokens), is {best.said}"
    return Finding(said=said, of=best.of, page=best.page, layer=best.layer)


def header(answers: Sequence[Answers], drawn_on: date) -> dict[str, str]:
    """What the report covers, by name: model, revision, quantization, tokens, data sets, coverage, and the day."""
    done, total = (sum(getattr(each.state, f"shards_{name}") for each in answers) for name in ("done", "total"))
    complete = all(each.state.complete for each in answers)
    sizes = _by_value(answers, _size)
    return {
        "Model": _by_value(answers, _model),
        **({"Layers and experts": sizes} if sizes else {}),
        "Revision": _by_value(answers, _revision),
        "Quantization": _by_value(answers, lambda each: str(each.attrs.get("quantization") or "not stated")),
        "Tokens": f"{sum(each['load'].attrs['n'] for each in answers):,}",
        "Data sets": f"{len(answers)}: {_listed([each.label for each in answers])}",
        "Coverage": f"{'complete' if complete else 'incomplete'}: {done:,} of {total:,} shards",
        "Generated": f"{drawn_on.day} {drawn_on:%B %Y}",
    }


def has_tiny(answers: Sequence[Answers]) -> bool:
    """Whether some of the data come from the model that is part of the code."""
    return any(each.attrs.get("model") == TINY for each in answers)


def _measured(answers: Sequence[Answers], captured: Sequence[Answers]) -> Finding:
    """What was measured, in words."""
    if not captured:
        return Finding(said=f"{_listed([each.label for each in answers])}: no token is captured yet.")
    tokens = sum(each["load"].attrs["n"] for each in captured)
    models = _listed(list(dict.fromkeys(f"{_model(each)} ({_size(each)})" for each in captured)))
    sets = _listed([each.label for each in captured])
    part = "" if all(each.state.complete for each in answers) else " (captured so far)"
    return Finding(said=f"{models} chose experts for {tokens:,} tokens of {sets}{part}.")


def _model(each: Answers) -> str:
    changes = changes_in_words(each.attrs)
    return f"{each.attrs.get('model') or 'a model not stated'}{f' with {changes}' if changes else ''}"


def _size(each: Answers) -> str:
    load = each["load"]
    layers = f"{load.sizes['layer']} layer{'s' if load.sizes['layer'] != 1 else ''}"
    return f"{load.sizes['k']} of {load.sizes['expert']} experts at {layers}"


def _revision(each: Answers) -> str:
    identity = each.attrs.get("identity") or {}
    kind, _, name = str(each.attrs.get("model_revision") or identity.get("model_revision") or "").rpartition(":")
    return f"{kind}{':' if kind else ''}{name[:_SHORT]}" or "not stated"


def _by_value(answers: Sequence[Answers], of: Callable[[Answers], str]) -> str:
    """The value for all data sets, or each value with its data sets."""
    alike: dict[str, list[str]] = {}
    for each in answers:
        alike.setdefault(of(each), []).append(each.label)
    if len(alike) == 1:
        return next(iter(alike))
    return "; ".join(f"{value} ({_listed(labels)})" for value, labels in alike.items())


def _listed(names: Sequence[str]) -> str:
    *first, last = map(visible, names)
    return f"{', '.join(first)} and {last}" if first else last
