"""Capture which experts a model chooses, for every token of one or more data sets.

usage: python jobs/capture.py --dataset DATASET [options]

Examples:
  python jobs/capture.py --local --model tiny --dataset demo:prose --store my.zarr
  python jobs/capture.py --dataset wikitext-103 --record logits --dry_run
  ray job submit -- python jobs/capture.py --dataset wikitext-103

What to capture:
  --dataset DATASET         demo:prose, wikitext-103, a file, folder or glob, a hub id; repeatable
  --store STORE             the output: a folder, or s3://bucket/prefix (~/expert-atlas/routes.zarr)
  --limit_documents N       only the first documents; --limit_tokens N: the first tokens of each
  --record WHAT             also logits, output_norm or logprob; repeat for more
  --preset notebook         the options of the project's original experiment
  also --name --split --text_field --revision --sequence_length --rows_per_shard --bos --top_logits
  --weight_precision --skip_unrenderable --template_date

Model:
  --model MODEL             a hub id, a folder, or tiny (Mixtral-8x7B-Instruct-v0.1)
  --mask LAYER:EXPERT       an expert that is never chosen; --force: one that always is; --top_k N
  also --model_revision --mask_file --force_file --routes_from --routes_weights

Precision:
  --quantization KIND       nf4, fp4, mxfp4, fp8, int8 or none (as stored, otherwise nf4 on a GPU)
  also --dtype --matmul --quantize_gates

Where to run:
  --local                   in this process, on one device, without Ray
  --device DEVICE           auto, cuda or cpu (auto)
  --workers N               copies of the model on a cluster (one on every GPU)
  also --gpus_per_worker --cpus_per_worker --batch_tokens --stall_minutes

Recovery: run the same command again to resume. Other options:
  --dry_run                 estimate tokens, bytes and memory without writing; with --rate: time
  --config FILE             options from a YAML file, as --print_config prints them
  --retry_quarantined       retry shards that failed three times; also --allow_mixed

docs/options.md explains every option. Exit status: 0 complete, 1 something is missing, 2 an error,
3 only quarantined shards are missing, 130 or 143 interrupted.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

from jobs.capturing.options import CaptureConfig, parse_capture, take_hub_token
from jobs.console.terminal import run_job, say_next
from workers.tiny import model_path


def main(arguments: list[str]) -> int:
    """Run the command; 0 when every data set is complete."""
    config = parse_capture(arguments)
    if config.print_config:
        print(config.as_yaml(), end="")
        return 0
    if not config.dataset:
        raise ValueError("give at least one --dataset, such as --dataset demo:prose; --help lists the kinds")
    model_path(config.model)  # reports a misspelled name before torch is imported
    take_hub_token()
    if config.dry_run:
        return _estimate(config)
    status, place = carry_out(config), config.store_path
    say_next(*(command_line(script, place) for script in (("explore", "report") if status == 0 else ("status",))))
    return status


def carry_out(config: CaptureConfig) -> int:
    """Capture, and return the exit status."""
    return _capture_here(config) if config.local else _capture_on_cluster(config)


# Each function imports only what it needs: torch and transformers take seconds, and --help must not wait for them.


def _estimate(config: CaptureConfig) -> int:
    from jobs.capturing.estimate import print_estimate
    from jobs.capturing.run import Run

    run = Run(config)
    for name, source in run.sources():
        print_estimate(run, name, source)
    return 0


def _capture_here(config: CaptureConfig) -> int:
    from jobs.capturing.captures import capture_datasets, exit_status
    from jobs.capturing.local import capture_here
    from jobs.capturing.run import Run

    run = Run(config)
    return exit_status(capture_datasets(run, run.sources(), capture_here))


def _capture_on_cluster(config: CaptureConfig) -> int:
    from jobs.capturing.captures import capture_datasets, exit_status
    from jobs.capturing.run import Run
    from jobs.cluster.ray_workers import connected

    sources = Run(config).sources()  # first, so that mistakes are reported before waiting for a cluster
    with connected(config) as cluster:
        return exit_status(capture_datasets(Run(config, cluster.device), sources, cluster.capture))


if __name__ == "__main__":
    run_job(main)
