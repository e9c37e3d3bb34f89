"""The example notebook, run offline in a kernel like a reader runs it; its numbers are computed again with Python
lists."""

import re
import shlex
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import altair as alt
import nbformat
import numpy as np
import pytest
import torch
import zarr
from notebooks import EXAMPLES, SIZE, Ran, run_here
from tokenizers import Tokenizer

import store
from jobs.capturing.options import PRESETS, parse_capture
from jobs.sources.demo import demo_source
from workers.models.loading import load_model
from workers.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NOTEBOOK = EXAMPLES / "original_experiment.ipynb"


def read() -> Any:
    """The notebook as it is committed."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the original experiment runs."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def run(folder: Path) -> Ran:
    """The original experiment, executed."""
    return run_here(read(), folder)


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.ipynb"))])
def test_it_is_committed_with_what_its_cells_show_and_names_no_machine(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text.encode()) < SIZE
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
    assert {"text/html", "image/svg+xml"} <= kinds
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert all(not cell.metadata for cell in notebook.cells)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert not re.search(r"/(home|tmp|work|root|Users)/", text)
    for link in re.findall(r"\]\(([^)#]+)\)", "".join(cell.source for cell in notebook.cells)):
        assert (EXAMPLES / link).exists(), link


def test_what_is_committed_is_what_it_shows_today(run: Ran) -> None:
    kept = {cell.id: cell for cell in read().cells}
    for name in ("token-to-experts", "expert-to-tokens", "path"):
        [output] = kept[name].outputs
        assert output.data["text/plain"] == run.shown[name, "text/plain"], "python tests/notebooks.py runs it anew"


def test_the_specialist_that_is_removed_hurts_its_own_text_alone() -> None:
    """The shares and the effect are computed again without a metric."""
    names = run_here(nbformat.read(EXAMPLES / "remove_a_specialist.ipynb", as_version=4), EXAMPLES).names
    whole, removed, found, control = (names[name] for name in ("whole", "removed", "found", "control"))
    share = {
        name: np.stack([(kept["expert"].values[kept["token"].values > 2] == e).any(-1).mean(0) for e in range(8)], -1)
        for name, kept in whole.items()
    }
    assert divmod(int((share["code"] - share["prose"]).argmax()), 8) == (names["layer"], names["expert"])
    for name in whole:
        change = (removed[name]["logprob"] - whole[name]["logprob"]).values
        assert float(found["effect"].sel(data_set=name)) == pytest.approx(float(np.nanmean(change)), abs=1e-4)
        assert not (removed[name]["expert"].sel(layer=names["layer"]) == names["expert"]).any()
    assert float(found["high"].sel(data_set="code")) < 0
    assert float(found["difference_p"].sel(data_set="code")) < 0.05
    assert float(control["high"].sel(data_set="prose")) < 0
    assert float(control["difference_p"].sel(data_set="prose")) < 0.05


def test_its_ten_lines_are_the_preset_but_for_the_one_that_is_marked() -> None:
    [cell] = [cell for cell in read().cells if cell.id == "ten-lines"]
    lines = [line for line in cell.source.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 10
    above, _, marked = cell.source.partition("# For the original, remove the next line")[2].partition("\n")
    assert "GPU" in above
    marked = marked.splitlines()[0]
    assert lines.count(marked) == 1
    options = [line.split('"')[1] for line in lines if line.startswith("options") and line != marked]
    config = parse_capture(shlex.split("".join(options)))
    where = {"local": True, "store": "notebook.zarr", "name": ("notebook",)}
    assert config == replace(PRESETS["notebook"], preset="notebook", **where)


def test_its_dictionaries_hold_what_python_lists_hold(run: Ran, folder: Path) -> None:
    group = zarr.open_group(folder / "notebook.zarr", mode="r")["notebook"]
    token, expert, piece = (group[name][:] for name in ("token", "expert", "piece"))
    assert token.shape == (8, 128)
    token_to_experts, expert_to_tokens = defaultdict(list), defaultdict(list)
    for row, position in np.ndindex(token.shape):
        for chosen in expert[row, position].reshape(-1).tolist():
            token_to_experts[piece[token[row, position]]].append(chosen)
            expert_to_tokens[chosen].append(piece[token[row, position]])
    assert (expert < 8).all(), "every position holds a token"
    by_token, by_expert = run.names["token_to_experts"], run.names["expert_to_tokens"]
    assert {x: Counter(experts) for x, experts in token_to_experts.items()} == {
        x: Counter({int(e): count for e, count in of.items() if count}) for x, of in by_token.items()
    }
    assert {e: Counter(tokens) for e, tokens in expert_to_tokens.items()} == {
        int(e): Counter({x: count for x, count in of.items() if count}) for e, of in by_expert.items()
    }


def test_its_choices_are_those_that_hooks_on_the_gates_see(run: Ran, folder: Path) -> None:
    """Like the original notebook: one text at a time through transformers' own forward pass, with logits computed from
    the gate's input."""
    loaded = load_model(tiny_checkpoint(), quantization="fp4", dtype="float16", quantize_gates=True, device="cpu")
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint() / "tokenizer.json"))
    data = store.open_capture(folder / "notebook.zarr", "notebook").load()
    seen: list[torch.Tensor] = []

    def hook(gate: Any, inputs: Any, _: Any) -> None:
        logits_TE = inputs[0].reshape(-1, inputs[0].shape[-1]) @ gate.weight.T
        seen.append(logits_TE.topk(2).indices)

    handles = [gate.register_forward_hook(hook) for gate in loaded.routers.values()]
    same = []
    for row, document in enumerate(islice(demo_source("demo:prose").documents(), 8)):
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids[:128]
        assert data["token"].values[row].tolist() == ids
        seen.clear()
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([ids]), use_cache=False)
        chosen = torch.stack(seen, dim=1).numpy()
        same.append((np.sort(chosen) == np.sort(data["expert"].values[row])).all(-1))
    for handle in handles:
        handle.remove()
    # 0.998 measured: two ways to multiply in float16 differ where experts nearly tie.
    assert np.mean(same) > 0.99
    identity = store.attributes(data)["identity"]
    assert identity["gate_precision"] == "fp4"
    assert (data.attrs["quantization"], identity["compute_dtype"]) == ("fp4", "float16")


def test_tables_are_html_and_charts_are_pictures_that_need_no_network(run: Ran) -> None:
    for name in ("token-to-experts", "expert-to-tokens", "path", "two-data-sets", "plain"):
        assert re.search(r"<table|xr-wrap", run.shown[name, "text/html"]), name
    assert "expert chosen" in run.shown["two-data-sets", "text/html"], "attributes are there to be unfolded"
    marks = {"load": ("rect mark", 64), "lift": ("text mark", 64), "repetition": ("point", 16)}
    marks |= {"transitions": ("circle", 64), "contrast": ("rect mark", 64)}
    for name, (mark, count) in marks.items():
        picture = run.shown[name, "image/svg+xml"]
        assert picture.count(f'aria-roledescription="{mark}"') == count, name
        assert set(re.findall(r"https?://[^/\"]+", picture)) == {"http://www.w3.org"}, name
        assert 'fill="white"' in picture.split("<text")[0], "a dark Jupyter shows it on white"


def test_charts_with_tooltips_carry_their_javascript_as_it_says() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    text = " ".join(word for cell in cells for word in cell.source.split())
    assert 'alt.renderers.enable("html", template="inline")' in text
    chart = alt.Chart(alt.InlineData(values=[{"x": 1}])).mark_point().encode(x="x:Q")
    with alt.renderers.enable("html", template="inline"):
        page = chart._repr_mimebundle_()["text/html"]
    assert "cdn.jsdelivr" not in page
    assert round(len(page) / 1e6, 1) == 0.9


def test_its_heat_map_and_its_plain_xarray_show_what_numpy_counts(run: Ran, folder: Path) -> None:
    prose, code = (
        store.open_capture(folder / "notebook.zarr", name).load()["expert"].values
        for name in ("demo-prose", "demo-code")
    )
    labels = re.findall(r"expert: (\d); layer: (\d); [^\"]*tokens: ([\d,]+)", run.shown["load", "image/svg+xml"])
    told = {(int(layer), int(expert)): int(tokens.replace(",", "")) for expert, layer, tokens in labels}
    assert told == {(layer, e): int((prose[:, :, layer] == e).sum()) for layer in range(8) for e in range(8)}
    first = code[..., 0]
    share = (first == 6).sum((0, 1)) / (first != 255).sum((0, 1))
    numbers = re.search(r"array\(\[([^\]]*)\]", run.shown["plain", "text/plain"])
    assert numbers is not None
    np.testing.assert_allclose([float(number) for number in numbers[1].split(",")], share, atol=1e-6)


def test_what_it_says_beside_its_results_is_so_and_nothing_warns(run: Ran) -> None:
    assert "arning" not in run.said
    assert len(re.findall(r"(?m)^\S+: complete, ", run.said)) == 3
    tops = re.findall(r"expert: (\d); .*?lift: ([\d.]+)", run.shown["lift", "image/svg+xml"])
    assert {expert for expert, lift in tops if float(lift) > 3} == set("0123456"), "experts of a layer come apart"
    apart = re.findall(r"p, corrected for all cells: ([\d.]+)", run.shown["contrast", "image/svg+xml"])
    assert 32 < sum(float(p) <= 0.05 for p in apart) < 64, "some cells are pale, most are not"
