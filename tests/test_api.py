"""The public names: each is documented, loads nothing before it is used, and every result describes itself."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpydoc.validate import validate
from synthetic import RECORD, make_capture

import analysis
import store
import workers
from analysis import described, scan
from analysis.attributes import REQUIRED
from analysis.scanning import Reducer
from analysis.statistics import parts

ROOT = Path(__file__).parents[1]
PACKAGES = (analysis, store, workers)
NAMES = [(package, name) for package in PACKAGES for name in package.__all__]
CAPTURE, OTHER = make_capture(), make_capture(seed=5)
MIXTRAL = make_capture(layers=(0, 7, 15))
RECORDED, OTHER_RECORDED = (make_capture(seed=seed, record=RECORD) for seed in (0, 5))  # the same tokens and choices
SCORES = analysis.scores_of(RECORDED)
MEMBERS = {"/w1/": analysis.members_of("/w1/", CAPTURE["piece"].values.tolist())}
IN_CLASSES = analysis.ClassCounts(MEMBERS)

# --- What is counted, looked up in the arrays -------------------------------------------------------------------------


def counted(capture: xr.Dataset) -> np.ndarray:
    """Positions with a token that counts; bool (row, position)."""
    inside = np.arange(capture.sizes["position"]) < capture["length"].values[:, None]
    return inside & ~np.isin(capture["token"].values, capture.attrs["special_token_ids"])


def tokens(capture: xr.Dataset = CAPTURE) -> int:
    return int(counted(capture).sum())


def predicted(capture: xr.Dataset = RECORDED) -> int:
    """Tokens that count and are followed by another in their row."""
    has_next = np.arange(capture.sizes["position"]) < capture["length"].values[:, None] - 1
    return int((counted(capture) & has_next).sum())


def pairs(capture: xr.Dataset = CAPTURE) -> int:
    """Adjacent pairs that both count: as many tokens have a left neighbor that counts."""
    both = counted(capture)
    return int((both[:, 1:] & both[:, :-1]).sum())


def documents(capture: xr.Dataset) -> int:
    """Documents with a token that counts."""
    return len(set(capture["document_id"].values[counted(capture).any(1)].tolist()))


def tokens_of_common(capture: xr.Dataset, other: xr.Dataset) -> int:
    """Tokens of the documents that both captures have."""
    common = np.isin(capture["document_id"].values, other["document_id"].values)
    return int(counted(capture)[common].sum())


def occurrences(least: int) -> int:
    """Occurrences of tokens that occur at least so often."""
    return sum(n for n in Counter(CAPTURE["token"].values[counted(CAPTURE)].tolist()).values() if n >= least)


def places(top: int) -> int:
    """Rows in which an expert is chosen, up to a maximum for each expert and layer."""
    routes = [row[own] for row, own in zip(CAPTURE["expert"].values, counted(CAPTURE), strict=True)]
    rows = Counter(
        (at, int(e)) for row in routes for at in range(row.shape[1]) for e in np.unique(row[:, at]) if len(row)
    )
    return sum(min(top, n) for n in rows.values())


# --- Every metric, and every reducer ----------------------------------------------------------------------------------

Ask = Callable[[xr.Dataset], Any]


def counts(*reducers: Reducer) -> list[xr.Dataset]:
    return scan(CAPTURE, reducers)


def recorded_counts(*reducers: Reducer) -> list[xr.Dataset]:
    return scan(RECORDED, reducers)


def with_logprob(capture: xr.Dataset) -> xr.Dataset:
    """The capture with the log-probability of the next token at each position, as if recorded."""
    logprob = np.full(capture["token"].shape, -1.0, np.float32)
    return capture.assign(logprob=(("doc", "position"), logprob)).chunk({"doc": 4})


def words(capture: xr.Dataset) -> xr.Dataset:
    table, shuffled = scan(capture, [analysis.TokenCounts(), analysis.ShuffledTokenCounts()])
    return analysis.vocabulary_specialization_of(table, [shuffled], min_count=3)


METRICS: dict[str, tuple[Ask, object]] = {
    "agreement": (lambda c: analysis.agreement(c, c), tokens()),
    "balance_null": (
        lambda c: analysis.balance_null(counts(analysis.Jackknife(analysis.ExpertCounts()))[0], draws=5),
        tokens(),
    ),
    "balance_of": (lambda c: analysis.balance_of(analysis.expert_load(c)), tokens()),
    "cache_hits": (lambda c: analysis.cache_hits(c, [2, 3]), pairs()),
    "cache_hits_of": (lambda c: analysis.cache_hits_of(counts(analysis.CacheCounts())[0]), pairs()),
    "class_excess_of": (
        lambda c: analysis.class_excess_of(counts(analysis.SampledRoutes())[0], MEMBERS, min_count=2),
        tokens(),
    ),
    "class_experts": (lambda c: analysis.class_experts(c, ["letters", "/w1/"]), tokens()),
    "class_experts_of": (lambda c: analysis.class_experts_of(counts(analysis.Jackknife(IN_CLASSES))[0]), tokens()),
    "coactivation": (analysis.coactivation, tokens()),
    "coactivation_of": (
        lambda c: analysis.coactivation_of(counts(analysis.Choices())[0], by="adjacent"),
        tokens(),
    ),
    "contrast": (
        lambda c: analysis.contrast({"a": c, "b": OTHER}, replicates=5),
        {"a": tokens(), "b": tokens(OTHER)},
    ),
    "dependent_experts": (lambda c: analysis.dependent_experts(analysis.position_load(c)), tokens()),
    "document_path": (
        lambda c: analysis.document_path(c, 3),
        int(counted(CAPTURE)[CAPTURE["document_id"].values == 3].sum()),
    ),
    "document_scores": (
        lambda c: analysis.document_scores({"a": c, "b": OTHER}),
        documents(CAPTURE) + documents(OTHER),
    ),
    "domain_information": (
        lambda c: analysis.domain_information({"a": c, "b": OTHER}, draws=2),
        tokens() + tokens(OTHER),
    ),
    "domain_specialization": (lambda c: analysis.domain_specialization(analysis.expert_load(c)), tokens()),
    "effect": (
        lambda c: analysis.effect(with_logprob(c), with_logprob(c), replicates=5),
        int(counted(CAPTURE)[:, 1:].sum()),
    ),
    "effect_by_data_set": (
        lambda c: analysis.effect_by_data_set({"a": (with_logprob(c), with_logprob(c))}, replicates=5),
        {"a": int(counted(CAPTURE)[:, 1:].sum())},
    ),
    "expert_load": (analysis.expert_load, tokens()),
    "expert_tokens": (lambda c: analysis.expert_tokens(c, 1), tokens()),
    "expert_tokens_of": (lambda c: analysis.expert_tokens_of(counts(analysis.TokenCounts())[0], by="lift"), tokens()),
    "first_repeated_by_load": (lambda c: analysis.first_repeated_by_load(analysis.expert_load(c)), tokens()),
    "frequent_windows": (analysis.frequent_windows, tokens()),
    "frequent_windows_of": (
        lambda c: analysis.frequent_windows_of(counts(analysis.WindowCounts(2))[0], by="surprise"),
        tokens(),
    ),
    "gpu_load": (lambda c: analysis.gpu_load(analysis.expert_load(c), 2), tokens()),
    "importance": (lambda c: analysis.importance(RECORDED, replicates=9), int(counted(CAPTURE)[:, 1:].sum())),
    "importance_of": (
        lambda c: analysis.importance_of(
            *recorded_counts(*map(analysis.Jackknife, (analysis.MaskEffects(), analysis.Load(), analysis.Saliency()))),
            replicates=9,
        ),
        int(counted(CAPTURE)[:, 1:].sum()),
    ),
    "importances": (
        lambda c: analysis.importances(dict.fromkeys("ab", RECORDED), replicates=9),
        dict.fromkeys("ab", int(counted(CAPTURE)[:, 1:].sum())),
    ),
    "growth": (lambda c: analysis.growth(c, analysis.Load(), halvings=2), tokens()),
    "layer_overlap_of": (lambda c: analysis.layer_overlap_of(counts(analysis.Choices())[0]), tokens()),
    "logprob_by_expert": (lambda c: analysis.logprob_by_expert(RECORDED), predicted()),
    "logprob_by_expert_of": (
        lambda c: analysis.logprob_by_expert_of(recorded_counts(analysis.Jackknife(analysis.LogProbability()))[0]),
        predicted(),
    ),
    "mean_contrast": (
        lambda c: analysis.mean_contrast({"a": RECORDED, "b": OTHER_RECORDED}, analysis.Saliency(), "mean_norm"),
        {"a": tokens(), "b": tokens(OTHER)},
    ),
    "mean_contrast_of": (
        lambda c: analysis.mean_contrast_of(
            dict.fromkeys("ab", recorded_counts(analysis.Jackknife(analysis.LogProbability()))[0]), "mean_logprob"
        ),
        {"a": predicted(), "b": predicted()},
    ),
    "paired_contrast": (
        lambda c: analysis.paired_contrast({"a": c, "b": OTHER}, replicates=5),
        {"a": tokens_of_common(CAPTURE, OTHER), "b": tokens_of_common(OTHER, CAPTURE)},
    ),
    "pointwise_of": (lambda c: analysis.pointwise_of(analysis.token_experts(c)), tokens()),
    "position_information": (lambda c: analysis.position_information(c, draws=2), tokens()),
    "position_load": (analysis.position_load, tokens()),
    "position_load_of": (
        lambda c: analysis.position_load_of(counts(analysis.ExpertCounts("doubling"))[0]),
        tokens(),
    ),
    "published_counts": (lambda c: analysis.published_counts(), 102 * 2048),
    "repetition": (analysis.repetition, pairs()),
    "router_distribution": (lambda c: analysis.router_distribution(RECORDED), tokens()),
    "saliency": (lambda c: analysis.saliency(RECORDED), tokens()),
    "saliency_of": (
        lambda c: analysis.saliency_of(
            *recorded_counts(analysis.Jackknife(analysis.Saliency()), analysis.LargestSaliency())
        ),
        tokens(),
    ),
    "router_confidence": (analysis.router_confidence, tokens()),
    "segment_cache_hits": (lambda c: analysis.segment_cache_hits(c, [4], [2]), pairs()),
    "segment_cache_hits_of": (
        lambda c: analysis.segment_cache_hits_of(counts(analysis.CacheCounts([4], segment_lengths=[2]))[0]),
        pairs(),
    ),
    "segment_routing": (lambda c: analysis.segment_routing(c, [4]), tokens()),
    "strongest_experts_of": (
        lambda c: analysis.strongest_experts_of(counts(analysis.Jackknife(IN_CLASSES))[0], min_count=2),
        tokens(),
    ),
    "surprise": (lambda c: analysis.surprise(RECORDED), predicted()),
    "surprise_and_entropy": (lambda c: analysis.surprise_and_entropy(RECORDED), predicted()),
    "surprise_and_entropy_of": (
        lambda c: analysis.surprise_and_entropy_of(
            recorded_counts(analysis.Jackknife(analysis.SurpriseEntropy(SCORES)))[0]
        ),
        predicted(),
    ),
    "token_contributions": (
        lambda c: analysis.token_contributions(c, OTHER),
        {"one": tokens(), "other": tokens(OTHER)},
    ),
    "token_excess_of": (
        lambda c: analysis.token_excess_of(counts(analysis.SampledRoutes())[0], min_count=2),
        tokens(),
    ),
    "token_experts": (lambda c: analysis.token_experts(c, 1), tokens()),
    "token_experts_of": (lambda c: analysis.token_experts_of(counts(analysis.TokenCounts())[0], [2, 0]), tokens()),
    "token_information": (lambda c: analysis.token_information(c, draws=2), tokens()),
    "token_information_of": (
        lambda c: analysis.token_information_of(counts(analysis.SampledRoutes())[0], draws=2),
        tokens(),
    ),
    "top_contexts": (analysis.top_contexts, places(20)),
    "transitions": (analysis.transitions, tokens()),
    "transitions_of": (lambda c: analysis.transitions_of(counts(analysis.Choices())[0], by="all"), tokens()),
    "validation": (lambda c: analysis.validation({"c4": MIXTRAL}, replicates=9), {"c4": tokens(MIXTRAL)}),
    "vocabulary_specialization": (
        lambda c: analysis.vocabulary_specialization(c, min_count=2, draws=5),
        occurrences(2),
    ),
    "vocabulary_specialization_of": (words, occurrences(3)),
    "whole_paths": (analysis.whole_paths, tokens()),
    "window_diversity": (lambda c: analysis.window_diversity(c, (1, 2)), tokens()),
    "window_diversity_of": (
        lambda c: analysis.window_diversity_of(counts(analysis.WindowCounts(1), analysis.WindowCounts(3))),
        tokens(),
    ),
}
"""A call of each public function that gives a labelled result, and the `n` that it must have."""

NO_METRICS = {"association", "conditional_information", "described", "entropy", "interval"}
"""Functions that take results of metrics, or any counts."""

REDUCERS: dict[str, tuple[Reducer, int]] = {
    "CacheCounts": (analysis.CacheCounts([2], segment_lengths=[3]), pairs()),
    "Choices": (analysis.Choices(), tokens()),
    "ClassCounts": (IN_CLASSES, tokens()),
    "Confidence": (analysis.Confidence(), tokens()),
    "ExpertCounts": (analysis.ExpertCounts(), tokens()),
    "Jackknife": (analysis.Jackknife(analysis.ExpertCounts(3), 4), tokens()),
    "LayerPairs": (analysis.LayerPairs([(0, 2), (2, 1)]), tokens()),
    "LargestSaliency": (analysis.LargestSaliency(), tokens()),
    "Load": (analysis.Load(), tokens()),
    "LogProbability": (analysis.LogProbability(), predicted()),
    "MaskEffects": (analysis.MaskEffects(), int(counted(CAPTURE)[:, 1:].sum())),
    "MeanWeights": (analysis.MeanWeights(), tokens()),
    "Parts": (analysis.Parts(analysis.Load(), 1, parts.halves), tokens()),
    "Repetition": (analysis.Repetition((1, 4)), pairs()),
    "RouterDistribution": (analysis.RouterDistribution(SCORES), tokens()),
    "Saliency": (analysis.Saliency(), tokens()),
    "SampledPredictions": (analysis.SampledPredictions(), tokens()),
    "SampledRoutes": (analysis.SampledRoutes(), tokens()),
    "SampledRows": (analysis.SampledRows(analysis.Load(), 1), tokens()),
    "SegmentRouting": (analysis.SegmentRouting((4,)), tokens()),
    "ShuffledTokenCounts": (analysis.ShuffledTokenCounts(), tokens()),
    "Surprise": (analysis.Surprise(), predicted()),
    "SurpriseEntropy": (analysis.SurpriseEntropy(SCORES), predicted()),
    "TokenCounts": (analysis.TokenCounts(), tokens()),
    "TokenPaths": (
        analysis.TokenPaths([3, 0]),
        int(np.isin(CAPTURE["token"].values[counted(CAPTURE)], [3, 0]).sum()),
    ),
    "TopContexts": (analysis.TopContexts(3), places(3)),
    "WindowCounts": (analysis.WindowCounts(2), tokens()),
}


def returned(function: Any) -> str:
    """The documented return value of a function."""
    return str(inspect.signature(function).return_annotation)


def test_every_metric_and_every_reducer_is_asked_here() -> None:
    public = {name: getattr(analysis, name) for name in analysis.__all__}
    functions = {name for name, found in public.items() if inspect.isfunction(found)}
    results = {name for name in functions if re.search("xr.Dataset|xr.DataArray|Result", returned(public[name]))}
    assert results - NO_METRICS - {"measure", "scan"} == METRICS.keys()
    reducers = {name for name, found in public.items() if inspect.isclass(found) and issubclass(found, Reducer)}
    assert reducers - {"Reducer"} == REDUCERS.keys()


def assert_says_what_it_is(result: Any, n: object) -> None:
    assert result.attrs["n"] == n
    assert set(REQUIRED) <= result.attrs.keys()
    assert all(result.attrs[name] not in (None, "") for name in (*REQUIRED, "counted"))


@pytest.mark.parametrize("name", METRICS)
def test_a_result_says_what_it_is_and_of_how_much(name: str) -> None:
    ask, n = METRICS[name]
    result = ask(CAPTURE)
    assert_says_what_it_is(result, n)
    assert all(dim in result.coords or dim in ("k", "step", "bin", "document") for dim in result.dims), result


@pytest.mark.parametrize("name", REDUCERS)
def test_what_a_reducer_counted_says_what_it_is_and_of_how_much(name: str) -> None:
    reducer, n = REDUCERS[name]
    assert_says_what_it_is(scan(RECORDED, [reducer])[0], n)


def hidden(result: Any) -> set[str]:
    """Variable names of a result that xarray uses itself: `result.NAME` would not return the numbers."""
    names = set(map(str, result.variables)) if isinstance(result, xr.Dataset) else {str(result.name), *result.coords}
    return names & {*dir(xr.Dataset), *dir(xr.DataArray)}


@pytest.mark.parametrize("name", METRICS)
def test_no_variable_of_a_result_has_a_name_of_xarray_s(name: str) -> None:
    assert hidden(METRICS[name][0](CAPTURE)) == set()


@pytest.mark.parametrize("name", REDUCERS)
def test_no_variable_that_a_reducer_counted_has_a_name_of_xarray_s(name: str) -> None:
    assert hidden(scan(RECORDED, [REDUCERS[name][0]])[0]) == set()


def test_a_name_of_xarray_s_is_found() -> None:
    values = ("layer", np.arange(2))
    assert hidden(xr.Dataset({"weighted": values, "share": values}, {"load": values})) == {"weighted", "load"}


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_reducer_whose_result_does_not_say_what_it_is_is_refused(missing: str) -> None:
    about = {"n": 1, "estimator": "counts", "null": 0.0, "definition": "a number", "source": "-"}

    class Own(analysis.Load):
        def finish(self, state: Any, dataset: xr.Dataset) -> xr.Dataset:
            return xr.Dataset(attrs={name: value for name, value in about.items() if name != missing})

    with pytest.raises(ValueError, match=rf"Own.finish returned a result without the attributes {missing}: return"):
        scan(CAPTURE, [Own()])
    with pytest.raises(TypeError, match=missing):
        described(xr.Dataset(), **{name: value for name, value in about.items() if name != missing})  # type: ignore[arg-type]


# --- Documentation ----------------------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """The parts of a numpydoc docstring, by heading."""
    parts = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}$", inspect.cleandoc(text), flags=re.MULTILINE)
    return dict(zip(["summary", *parts[1::2]], parts[::2], strict=True))


FAULTS = {
    "GL06": "a section that numpydoc does not know",
    "GL07": "sections in another order than numpydoc's",
    "PR01": "a parameter that is not documented",
    "PR02": "a parameter that is documented and not there",
    "PR03": "parameters in another order than the signature's",
}


def faults(name: str) -> list[str]:
    """The faults listed above that numpydoc finds in a docstring."""
    return [message for code, message in validate(name)["errors"] if code in FAULTS]


def raises(function: Any, error: str) -> bool:
    """Whether the function itself raises it."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    nodes = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise))
    return any(isinstance(exc, ast.Call) and ast.unparse(exc.func) == error for exc in nodes)


def assert_documented(function: Any, text: str) -> None:
    found = sections(text)
    if raises(function, "ValueError"):
        assert "ValueError" in found.get("Raises", "")
    if returned(function) not in ("None", "<class 'inspect._empty'>"):
        given = found.get("Returns", found.get("Yields", ""))
        assert given
        if re.search(r"xr\.Dat|Array\b", returned(function)):
            assert_shape_and_type(given)


def assert_shape_and_type(given: str) -> None:
    """Dims or shape and dtype, or the public function that names them."""
    if see := re.search(r"See `(?:analysis\.)?(\w+)`", given):
        given = sections(str(getattr(analysis, see[1]).__doc__))["Returns"]
    assert re.search(r"\b(u?int\d*|float\d*|bool|str|dtypes?|type)\b", given), given
    assert re.search(r"\([a-z_]+(, [a-z_]+)*\)|[Oo]ver|\bdim(ension)?s\b|[Ll]azy", given), given


def defined_in(package: ModuleType, name: str) -> ModuleType:
    """The module that the package's stub names."""
    stub = Path(str(package.__file__)).with_suffix(".pyi").read_text(encoding="utf-8")
    [where] = re.findall(rf"^from (\S+) import {name} as {name}$", stub, flags=re.MULTILINE)
    return importlib.import_module(where, package.__name__)


def beneath(module: ModuleType, name: str) -> str:
    """The text beneath the assignment of a name."""
    body = ast.parse(inspect.getsource(module)).body
    for node, after in pairwise(body):
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in ast.unparse(node).partition("=")[0]:
            return str(ast.literal_eval(after.value)) if isinstance(after, ast.Expr) else ""
    return ""


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[f"{package.__name__}.{name}" for package, name in NAMES])
def test_a_public_name_is_documented(package: ModuleType, name: str) -> None:
    found = getattr(package, name)
    assert not inspect.ismodule(found), "a module of that name would hide it"
    if inspect.isfunction(found):
        assert faults(f"{package.__name__}.{name}") == []
        assert_documented(found, found.__doc__ or "")
    elif inspect.isclass(found):
        assert found.__doc__
        assert found.__doc__.startswith(f"{name}(") is False, "written, not made by dataclass or NamedTuple"
        if "__init__" in vars(found) and not is_dataclass(found):
            assert faults(f"{package.__name__}.{name}") == []
        for member, method in inspect.getmembers(found, inspect.isfunction):
            assert member.startswith("_") or method.__doc__, member
    else:
        assert beneath(defined_in(package, name), name)


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_the_list_of_names_is_sorted_and_complete(package: ModuleType) -> None:
    assert package.__all__ == sorted(set(package.__all__))
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="expert_laod"):
        package.expert_laod  # noqa: B018


def fresh(code: str) -> Iterator[str]:
    """The modules of other packages that a new interpreter has loaded after some code."""
    code = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return iter(done.stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_alone_loads_nothing_that_only_some_of_its_names_need(package: ModuleType) -> None:
    heavy = {"torch", "transformers", "ray", "xarray", "dask", "numba", "altair"}
    name = package.__name__
    assert heavy.isdisjoint(fresh(f"import {name}; dir({name}); {name}.__all__"))


def test_all_names_of_the_analysis_load_without_torch_ray_or_transformers() -> None:
    loaded = set(fresh("import analysis.report.page, analysis\nfor name in analysis.__all__: getattr(analysis, name)"))
    assert "xarray" in loaded
    assert loaded.isdisjoint({"torch", "ray", "transformers", "numba"}), "numba is loaded when a kernel is first called"
