"""Measure what every expert does to predictions: mask it at its layer, and see what is lost.

usage: python jobs/importance.py --dataset DATASET [options]

Examples:
  python jobs/importance.py --local --model tiny --dataset demo:prose
  python jobs/importance.py --dataset wikitext-103 --layers 3-5 --figures figures
  ray job submit -- python jobs/importance.py --dataset wikitext-103 --dry_run

What to measure:
  --dataset DATASET         as jobs/capture.py takes it; repeat for more
  --layers LAYERS           whose experts: 3, or 3-5; repeat for more (all)
  --sample_tokens N         documents are drawn at random until they have so many (65536)
  --limit_tokens N          the first tokens of each document (2048)
  --store STORE             where the effects are kept (~/expert-atlas/routes.zarr)
  also --seed --name --split --text_field --revision --sequence_length --rows_per_shard --bos
  --skip_unrenderable --template_date

What becomes of the effects:
  --output FOLDER, -o       a small store that xarray opens (importance.zarr)
  --figures FOLDER          a chart of each data set as SVG, PDF and PNG
  --write_mask FILE         the least important experts of each layer, for --mask_file
  --least N                 with --write_mask: so many of each layer (1)
  --json                    one JSON document, for scripts; docs/json.md names its keys

Model and precision:
  --model MODEL             a hub id, a folder, or tiny (Mixtral-8x7B-Instruct-v0.1)
  --quantization KIND       nf4, fp4, mxfp4, fp8, int8 or none
  also --model_revision --dtype --matmul --quantize_gates

Where to run:
  --local                   in this process, on one device, without Ray
  also --device --workers --gpus_per_worker --cpus_per_worker --batch_tokens --stall_minutes

Recovery: the same command resumes what was stopped. Its other options:
  --dry_run                 estimate tokens, bytes and memory, and write nothing; with --rate: time
  also --retry_quarantined --allow_mixed

docs/options.md explains every option. Exit status: 0 measured, 1 something is missing, 2 a mistake,
3 only shards in quarantine are missing, 130 or 143 interrupted.
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
    """Measure, and tell what was found."""
    config = parse_importance(arguments)
    if not config.dataset:
        raise ValueError("give at least one --dataset, such as --dataset demo:prose; --help lists the kinds")
    model_path(config.model)  # a name with a typo is an error before torch is imported
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
    """Have the effects measured that are missing, in this process or on a cluster."""
    from jobs.capturing.captures import capture_datasets
    from jobs.capturing.importance_run import ImportanceRun

    run = ImportanceRun(config)
    sources = run.sources()  # a data set that is not there is reported before a cluster is waited for
    if config.local:
        from jobs.capturing.local import capture_here

        return capture_datasets(run, sources, capture_here)
    from jobs.cluster.ray_workers import connected

    with connected(config) as cluster:
        run = ImportanceRun(config, cluster.device)  # whose device may do what this machine's cannot
        return capture_datasets(run, run.sources(), cluster.capture)


def _refuse_output(config: ImportanceConfig) -> None:
    """Refuse a place that holds anything but an earlier result, or that contains the store or lies in it."""
    output, captures = config.output.resolve(), Path(config.store_path).resolve()
    if output.is_relative_to(captures) or captures.is_relative_to(output):
        raise ValueError(
            f"--output {config.output} and --store {captures}: neither may lie in the other; name another folder"
        )
    about = output / "zarr.json"
    earlier = about.is_file() and FORMAT in about.read_text(encoding="utf-8", errors="replace")
    if output.exists() and not earlier:
        raise ValueError(f"--output {config.output} is there, and no result of this job: name a new folder")


def _found(config: ImportanceConfig, states: "Sequence[Coverage]") -> "xr.Dataset":
    """The importance of every expert on each data set, written as a small store too."""
    from numpy.dtypes import StringDType

    from analysis.metrics.importance import importances
    from store.reader import open_covered

    captures = {state.dataset: open_covered(config.store_path, state) for state in states}
    with reporting("effects", unit="shards", transient=True) as report:
        together = importances(captures, progress=lambda done, total: report.add(1))
    model = next(iter(captures.values())).attrs["model"]
    together.attrs = flat({**together.attrs, "model": model, "format": FORMAT})
    texts = {name: {"dtype": StringDType()} for name, each in together.variables.items() if each.dtype.kind == "U"}
    _refuse_output(config)  # again: measuring takes hours
    with whole_folder(config.output) as unfinished:
        together.to_zarr(unfinished, mode="w", consolidated=False, encoding=texts)
    log(f"the effects by data set, layer and expert are in {config.output}")
    return together


def _write_mask(file: Path, found: "xr.Dataset", least: int) -> None:
    """The least important experts, as --mask_file of jobs/capture.py takes them."""
    from analysis.metrics.importance import least_important

    with whole_file(file) as unfinished:
        unfinished.write_text(json.dumps(least_important(found, least)), encoding="utf-8")
    log(f"the {least} least important experts of each layer are in {file}")


def _draw(folder: Path, found: "xr.Dataset") -> None:
    """A chart of each data set."""
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
