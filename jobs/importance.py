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
  --limit_tokens N          the first tokens of each document (2048); --seed N: of the draw (0)
  --store STORE             where the effects are kept (~/expert-atlas/routes.zarr)
  also --name --split --text_field --revision --sequence_length --rows_per_shard --bos
  --skip_unrenderable --template_date

What becomes of the effects:
  --output FOLDER, -o       a small store that xarray opens (importance.zarr)
  --figures FOLDER          a chart of each data set as SVG, PDF and PNG
  --write_mask FILE         the least important experts, for --mask_file; --least N of each layer (1)
  --json                    one JSON document, for scripts; docs/json.md names its keys

Model and precision:
  --model MODEL             a hub id, a folder, or tiny (Mixtral-8x7B-Instruct-v0.1)
  --quantization KIND       nf4, fp4, mxfp4, fp8, int8 or none
  also --model_revision --dtype --matmul --quantize_gates

Where to run:
  --local                   in this process, on one device, without Ray
  also --device --workers --gpus_per_worker --cpus_per_worker --batch_tokens --stall_minutes

Recovery: the same command resumes what was stopped. Its other options:
  also --dry_run --retry_quarantined --allow_mixed

docs/options.md explains every option. Exit status: 0 measured, 1 something is missing, 2 a mistake,
3 only shards in quarantine are missing, 130 or 143 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import start

start(__name__, __doc__)

from jobs.capturing.importance_options import ImportanceConfig, parse_importance
from jobs.capturing.options import take_hub_token
from jobs.console.terminal import run_job
from workers.tiny import model_path

if TYPE_CHECKING:
    from store import Coverage


def main(arguments: list[str]) -> int:
    """Measure, and tell what was found."""
    config = parse_importance(arguments)
    if not config.dataset:
        raise ValueError("give at least one --dataset, such as --dataset demo:prose; --help lists the kinds")
    model_path(config.model)  # a name with a typo is an error before torch is imported
    take_hub_token()
    if config.dry_run:
        return _estimate(config)

    from jobs.capturing.captures import exit_status

    states = _measured(config)
    return exit_status(states)


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
    sources = run.sources()  # a mistake is reported before a cluster is waited for
    if config.local:
        from jobs.capturing.local import capture_here

        return capture_datasets(run, sources, capture_here)
    from jobs.cluster.ray_workers import connected

    with connected(config) as cluster:
        return capture_datasets(ImportanceRun(config, cluster.device), sources, cluster.capture)


if __name__ == "__main__":
    run_job(main)
