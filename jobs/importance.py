"""Measure the effect of every expert on predictions, by masking it at its layer.

usage: python jobs/importance.py --dataset DATASET [options]

Examples:
  python jobs/importance.py --local --model tiny --dataset demo:prose
  python jobs/importance.py --dataset wikitext-103 --layers 3-5 --figures figures
  ray job submit -- python jobs/importance.py --dataset wikitext-103 --dry_run

What to measure:
  --dataset DATASET         as for jobs/capture.py; repeat for more
  --layers LAYERS           layers to measure: 3, or 3-5; repeat for more (all)
  --sample_tokens N         size of a random sample of documents (65536)
  --limit_tokens N          the first tokens of each document (2048)
  --store STORE             where the effects are kept (~/expert-atlas/routes.zarr)
  also --seed --name --split --text_field --revision --sequence_length --rows_per_shard --bos
  --skip_unrenderable --template_date

Output:
  --output FOLDER, -o       a small store that xarray opens (importance.zarr)
  --figures FOLDER          one chart per data set, as SVG, PDF and PNG
  --write_mask FILE         the least important experts of each layer, for --mask_file
  --least N                 with --write_mask: number of experts per layer (1)
  --json                    one JSON document, for scripts; docs/json.md names its keys

Model and precision:
  --model MODEL             a hub id, a folder, or tiny (Mixtral-8x7B-Instruct-v0.1)
  --quantization KIND       nf4, fp4, mxfp4, fp8, int8 or none
  also --model_revision --dtype --matmul --quantize_gates

Where to run:
  --local                   in this process, on one device, without Ray
  also --device --workers --gpus_per_worker --cpus_per_worker --batch_tokens --stall_minutes

Recovery: run the same command again to resume. Other options:
  --dry_run                 estimate tokens, bytes and memory without writing; with --rate: time
  also --retry_quarantined --allow_mixed

docs/options.md explains every option. Exit status: 0 measured, 1 something is missing, 2 an error,
3 only quarantined shards are missing, 130 or 143 interrupted.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

from jobs.capturing.importance_options import ImportanceConfig, parse_importance
from jobs.capturing.options import take_hub_token
from jobs.console.importance_rows import importance_told, print_importance
from jobs.console.tables import print_json, stdout_console
from jobs.console.terminal import log, reporting, run_job, say_next
from store.attributes import flat
from store.files import whole_file, whole_folder
from workers.tiny import model_path

if TYPE_CHECKING:
    import xarray as xr

    from store import Coverage

FORMAT = "expert-atlas importance 1"


def main(arguments: list[str]) -> int:
    """Measure, and report the results."""
    config = parse_importance(arguments)
    if not config.dataset:
        raise ValueError("give at least one --dataset, such as --dataset demo:prose; --help lists the kinds")
    model_path(config.model)  # reports a misspelled name before torch is imported
    take_hub_token()
    if config.dry_run:
        return _estimate(config)

    _refuse_output(config)

    from jobs.capturing.captures import exit_status

    states = _measured(config)
    status = exit_status(states)
    if any(not (state.tokens_done or state.complete) for state in states):
        return status
    found = _found(config, states)
    if config.write_mask is not None:
        _write_mask(config.write_mask, found, config.least)
    if config.figures is not None:
        _draw(config.figures, found)
    _tell(config, found)
    say_next(command_line("report" if status == 0 else "status", config.store_path))
    return status


def _estimate(config: ImportanceConfig) -> int:
    from jobs.capturing.estimate import print_estimate
    from jobs.capturing.importance_run import ImportanceRun

    run = ImportanceRun(config)
    for name, source in run.sources():
        print_estimate(run, name, source)
    return 0


def _measured(config: ImportanceConfig) -> "Sequence[Coverage]":
    """Measure the missing effects, in this process or on a cluster."""
    from jobs.capturing.captures import capture_datasets
    from jobs.capturing.importance_run import ImportanceRun

    run = ImportanceRun(config)
    sources = run.sources()  # reports a missing data set before waiting for a cluster
    if config.local:
        from jobs.capturing.local import capture_here

        return capture_datasets(run, sources, capture_here)
    from jobs.cluster.ray_workers import connected

    with connected(config) as cluster:
        run = ImportanceRun(config, cluster.device)  # its device may support what this machine's does not
        return capture_datasets(run, run.sources(), cluster.capture)


def _refuse_output(config: ImportanceConfig) -> None:
    """Raise if the output is not an earlier result, contains the store, or is inside it."""
    output, captures = config.output.resolve(), Path(config.store_path).resolve()
    if output.is_relative_to(captures) or captures.is_relative_to(output):
        raise ValueError(
            f"--output {config.output} and --store {captures}: neither may be inside the other; use another folder"
        )
    about = output / "zarr.json"
    earlier = about.is_file() and FORMAT in about.read_text(encoding="utf-8", errors="replace")
    if output.exists() and not earlier:
        raise ValueError(f"--output {config.output} exists and is not a result of this job: use a new folder")


def _found(config: ImportanceConfig, states: "Sequence[Coverage]") -> "xr.Dataset":
    """The importance of every expert on each data set, also written as a small store."""
    from numpy.dtypes import StringDType

    from analysis.metrics.importance import importances
    from store.reader import open_covered

    captures = {state.dataset: open_covered(config.store_path, state) for state in states}
    with reporting("effects", unit="shards", transient=True) as report:
        together = importances(captures, progress=lambda done, total: report.add(1))
    model = next(iter(captures.values())).attrs["model"]
    together.attrs = flat({**together.attrs, "model": model, "format": FORMAT})
    texts = {name: {"dtype": StringDType()} for name, each in together.variables.items() if each.dtype.kind == "U"}
    _refuse_output(config)  # checked again, because measuring takes hours
    with whole_folder(config.output) as unfinished:
        together.to_zarr(unfinished, mode="w", consolidated=False, encoding=texts)
    log(f"the effects by data set, layer and expert are in {config.output}")
    return together


def _write_mask(file: Path, found: "xr.Dataset", least: int) -> None:
    """Write the least important experts, for --mask_file of jobs/capture.py."""
    from analysis.metrics.importance import least_important

    with whole_file(file) as unfinished:
        unfinished.write_text(json.dumps(least_important(found, least)), encoding="utf-8")
    log(f"the {least} least important experts of each layer are in {file}")


def _draw(folder: Path, found: "xr.Dataset") -> None:
    """Draw one chart per data set."""
    from analysis.charts.files import write_chart
    from analysis.charts.heatmaps import importance_heatmap

    for name in found["data_set"].values.tolist():
        write_chart(importance_heatmap(found.sel(data_set=name)).spec, folder, f"effect-{name}")
    log(f"{found.sizes['data_set']} charts are in {folder}")


def _tell(config: ImportanceConfig, found: "xr.Dataset") -> None:
    told = importance_told(found)
    if config.json:
        print_json(told)
    else:
        print_importance(stdout_console(), told)


if __name__ == "__main__":
    run_job(main)
