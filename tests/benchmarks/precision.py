"""The effect of rounding on routing: `python tests/benchmarks/precision.py -o RESULT.json`, on a machine with a GPU.

Then `python tests/benchmarks/precision.py --draw RESULT.json -o docs/precision.svg` anywhere.

The tiny Mixtral routes the demo's four held-out texts repeatedly: in other precisions, in other batches, on the CPU,
with other code for the experts. Each is compared with one of the others, token by token. Intervals are over resampled
documents.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from analysis.metrics.agreement import Agreement, agreement, paired  # noqa: E402
from analysis.scanning import scan  # noqa: E402
from analysis.statistics.jackknife import Jackknife, interval  # noqa: E402
from jobs.demo import TEXTS  # noqa: E402
from jobs.sources.demo import demo_source  # noqa: E402
from workers import capture_texts  # noqa: E402
from workers.models.loading import load_model  # noqa: E402
from workers.tiny import tiny_checkpoint  # noqa: E402

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"quantization": "none", "dtype": "float32"},
    "bfloat16": {"quantization": "none", "dtype": "bfloat16"},
    "float16": {"quantization": "none", "dtype": "float16"},
    "int8": {"quantization": "int8", "dtype": "bfloat16"},
    "nf4": {"quantization": "nf4", "dtype": "bfloat16"},
    "nf4, float32": {"quantization": "nf4", "dtype": "float32"},
    "nf4, fp8 products": {"quantization": "nf4", "dtype": "bfloat16", "matmul": "fp8"},
    "fp8": {"quantization": "fp8", "dtype": "bfloat16"},
    "fp8, fp8 products": {"quantization": "fp8", "dtype": "bfloat16", "matmul": "fp8"},
    "nf4, gates too": {"quantization": "nf4", "dtype": "bfloat16", "quantize_gates": True},
    "fp4": {"quantization": "fp4", "dtype": "bfloat16"},
    "fp4, gates too, float16": {"quantization": "fp4", "dtype": "float16", "quantize_gates": True},
}
"""The last one is that of the notebook."""
BACK_ENDS = {"bfloat16": ("grouped_mm", "eager", "batched_mm"), "nf4": ("sorted", "grouped")}
"""Products that captures of that precision support; the first is the default of a capture on a GPU."""
ALONE, BATCHED = 512, 32_768


@cache
def texts() -> list[str]:
    """The demo's documents, all of them held out from the training."""
    return [document.text for name, many in TEXTS.items() for document in islice(demo_source(name).read(0), many)]


def captured(precision: str, device: str, batch_tokens: int = BATCHED, back_end: str | None = None) -> xr.Dataset:
    """The texts' routes."""
    loaded = load_model(tiny_checkpoint(), device=device, **PRECISIONS[precision])
    if back_end in BACK_ENDS["nf4"]:
        loaded = replace(loaded, provenance=loaded.provenance | {"expert_backend": back_end})
    elif back_end is not None:
        loaded.model.set_experts_implementation(back_end)
    routes = capture_texts(loaded, texts(), sequence_length=512, batch_tokens=batch_tokens)
    print(f"{precision}, {device}, {batch_tokens} tokens, {back_end or 'default'}", file=sys.stderr, flush=True)
    return routes


def compared(one: xr.Dataset, other: xr.Dataset) -> dict[str, Any]:
    """Agreement by layer and by margin; the intervals are those of the jackknife over documents."""
    whole = agreement(one, other)
    drawn = scan(paired(one, other), [Jackknife(Agreement())])[0]
    found = interval(drawn["same_set"], scale="share")
    return {
        "tokens": whole.attrs["n"],
        "differ_somewhere": whole.attrs["any_difference"],
        "same_set": rounded(found["estimate"]),
        "same_set_low": rounded(found["low"]),
        "same_set_high": rounded(found["high"]),
        "same_first": rounded(whole["same_first"]),
        "margin": rounded(whole["margin"]),
        "margin_at_flips": rounded(whole["margin_at_flips"]),
        "first_flips_by_margin": rounded(1 - whole["same_first_of_margin"].weighted(
            whole["tokens_of_margin"]).mean("layer")),
        "share_of_tokens_by_margin": rounded(
            whole["tokens_of_margin"].sum("layer") / whole["tokens_of_margin"].sum()),
    }  # fmt: skip


def rounded(values: xr.DataArray) -> list[float | None]:
    """Five digits; None where a value is missing."""
    return [None if np.isnan(value) else round(float(value), 5) for value in values.values]


def draw(result: dict[str, Any], output: Path) -> None:
    """By layer and by margin, as SVG."""
    import altair as alt

    import analysis.charts.theme  # noqa: F401  (the reports' colours)

    layers, margins = [], []
    for pair, found in result["pairs"].items():
        against, _, name = pair.partition(" → ")
        if against != "float32" or name in ("float16", "nf4, float32"):
            continue
        ends = zip(found["same_set"], found["same_set_low"], found["same_set_high"], strict=True)
        for layer, (same, low, high) in enumerate(ends):
            layers.append({"precision": name, "layer": layer, "differ": 1 - same, "low": 1 - high, "high": 1 - low})
        for number, share in enumerate(found["first_flips_by_margin"]):
            margins.append({"precision": name, "margin": (number + 0.5) / 10, "differ": share or None})
    names = [name for name in PRECISIONS if any(row["precision"] == name for row in layers)]
    colour = alt.Color(
        "precision:N",
        sort=names,
        title="weights",
        scale=alt.Scale(domain=names),
        legend=alt.Legend(symbolOpacity=1, labelLimit=300),
    )
    share = partial(alt.Y, axis=alt.Axis(format="%"))
    by_layer = alt.Chart(alt.Data(values=layers)).encode(alt.X("layer:O", title="layer"), colour)
    lines = by_layer.mark_line(point=True).encode(share("differ:Q", title="share of tokens"))
    bands = by_layer.mark_area(opacity=0.15).encode(share("low:Q", title="share of tokens"), alt.Y2("high:Q"))
    by_margin = (
        alt.Chart(alt.Data(values=margins))
        .mark_line(point=True)
        .encode(
            alt.X("margin:Q", title="margin in float32: first weight less the second"),
            share("differ:Q", title="share of tokens", scale=alt.Scale(type="log")),
            colour,
        )
    )
    size = {"width": 330, "height": 300}
    left = (bands + lines).properties(title="Tokens with another set of experts than in float32", **size)
    right = by_margin.properties(title="Tokens with another first choice, by margin", **size)
    (left | right).properties(background="white", padding=12).save(output, format="svg")


def main() -> None:
    """Capture, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this script out")
    parser.add_argument("--draw", type=Path, help="a result, to be drawn")
    options = parser.parse_args()
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.output)
        return
    here = options.device
    route = cache(captured)
    pairs: dict[str, tuple[Callable[[], xr.Dataset], Callable[[], xr.Dataset]]] = {}
    for name in list(PRECISIONS)[1:]:
        pairs[f"float32 → {name}"] = (partial(route, "float32", here), partial(route, name, here))
    for one, other in (("nf4", "nf4, gates too"), ("nf4", "nf4, float32")):
        pairs[f"{one} → {other}"] = (partial(route, one, here), partial(route, other, here))
    for name in ("float32", "bfloat16", "nf4"):
        pairs[f"{name}: 64 rows → rows alone"] = (partial(route, name, here), partial(route, name, here, ALONE))
    for name in ("float32", "nf4, float32", "bfloat16", "nf4"):
        pairs[f"{name}: GPU → CPU"] = (partial(route, name, here), partial(route, name, "cpu", 8192))
    for name, back_ends in BACK_ENDS.items():
        for other in back_ends[1:]:
            usual, with_other = partial(route, name, here), partial(route, name, here, BATCHED, other)
            pairs[f"{name}: {back_ends[0]} → {other}"] = (usual, with_other)
    found = {name: compared(one(), other()) for name, (one, other) in pairs.items()}
    for name, one in found.items():
        print(f"{name:42} {one['differ_somewhere']:8.3%} {np.mean(one['same_set']):8.3%} {one['same_set']}")
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if here == "cuda" else None,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "texts": dict(TEXTS),
        "sequence_length": 512,
        "pairs": found,
    }
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
