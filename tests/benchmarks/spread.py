"""A model over two GPUs: `python tests/benchmarks/spread.py --model NAME --layers 20 -o RESULT.json`, by hand.

Creates a random checkpoint (gpt-oss in MXFP4 as published, others in NF4 as written by `jobs/quantize.py`), and
captures real text with `jobs/capture.py --local --gpus_per_worker 2`, and also with 1 if one GPU can hold the model.
Their stores must have equal bytes. If the disk is too small and fewer layers are used, the file says so.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import gpu_capture  # noqa: E402
from checkpoints import checkpoint_gb  # noqa: E402
from families import CONFIGS, config_of, save_checkpoint  # noqa: E402


def main() -> None:
    """Make the model, capture with two cards and with one, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, required=True)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--batch_tokens", type=int, default=16_384)
    parser.add_argument("--cards", type=int, nargs="+", default=[2, 1], help="how many, one run each")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    whole = CONFIGS[options.model]().num_hidden_layers
    config = config_of(options.model, options.layers)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, started = Path(folder) / options.model, time.monotonic()
        with torch.inference_mode():
            save_checkpoint(config, checkpoint)
        result: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "zarr")},
            "model": options.model,
            "layers": f"{config.num_hidden_layers} of {whole}",
            "checkpoint_gb": round(checkpoint_gb(checkpoint), 1),
            "seconds_to_make_checkpoint": round(time.monotonic() - started, 1),
        }
        torch.cuda.empty_cache()
        stores = {}
        for cards in options.cards:
            gpu_capture.OPTIONS[:] = ["--batch_tokens", str(options.batch_tokens), "--gpus_per_worker", str(cards)]
            stores[cards] = Path(folder) / f"{cards}.zarr"
            command = gpu_capture.command(checkpoint, stores[cards], options.documents, "--local")
            with ExitStack() as stack:
                seen = [stack.enter_context(gpu_capture.Card(card)) for card in range(cards)]
                ran = gpu_capture.run(command, stores[cards])
            peaks = [round(card.peak_mib() / 1024, 2) for card in seen]
            result[f"on_{cards}"] = ran | {"peak_gib_of_each_card": peaks}
            print(json.dumps(result[f"on_{cards}"]), flush=True)
        if len(stores) > 1:
            one, *others = (gpu_capture.objects(store) for store in stores.values())
            result["bytes_equal"] = bool(one) and all(one == other for other in others)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
