"""A capture on all GPUs of a host: `python tests/benchmarks/gpu_many.py --gpus 4 -o RESULT.json`, by hand.

Makes a random NF4 checkpoint of Mixtral 8x7B's full size, and submits jobs to a Ray head on this host, with a worker on
each of 4, 2 and 1 GPUs: real text, in proportion to the number of GPUs. The checkpoint is not in the page cache when
the first job starts: all its workers load at once from the disk. Then the model is spread over two GPUs, each with less
memory than it needs; and the job with all GPUs runs again, with one worker killed with SIGKILL in the middle.

The utilization of the GPUs is reported by the driver (package nvidia-ml-py), read ten times a second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from checkpoints import checkpoint_gb, make_checkpoint  # noqa: E402
from gpu_capture import Card, objects  # noqa: E402
from page_cache import drop_from_cache  # noqa: E402
from ray_head import RAY, Head, ray_head  # noqa: E402

from store import coverage, dataset_names  # noqa: E402

ROWS_PER_SHARD = 32
CAP_GIB = 18.0  # for each of two GPUs: the model's weights take 22
LIMITED = f"""
import runpy, sys, torch
for card in range(2):
    torch.cuda.set_per_process_memory_fraction({CAP_GIB} * 2**30 / torch.cuda.mem_get_info(card)[1], card)
sys.argv[0] = {str(ROOT / "jobs" / "capture.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Host:
    """The host's activity while the block runs: CPU seconds, memory, bytes read from disks, the driver's CPU
    seconds."""

    def __enter__(self) -> "Host":
        self.started, self.read = time.monotonic(), psutil.disk_io_counters().read_bytes
        self.cpu = sum(psutil.cpu_times()[index] for index in (0, 1, 2))
        self.most_used, self.driver_mib = 0, 0
        self.driver_s: dict[int, float] = {}
        self.done = threading.Event()
        self.reader = threading.Thread(target=self._watch, daemon=True)
        self.reader.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.5):
            self.most_used = max(self.most_used, psutil.virtual_memory().used)
            for process in processes("jobs/capture.py"):
                with suppress(psutil.Error):  # it may have ended
                    self.driver_s[process.pid] = sum(process.cpu_times()[:2])
                    self.driver_mib = max(self.driver_mib, process.memory_info().rss >> 20)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.reader.join()
        seconds = time.monotonic() - self.started
        self.told = {
            "cpu_cores_busy": round((sum(psutil.cpu_times()[index] for index in (0, 1, 2)) - self.cpu) / seconds, 2),
            "memory_gib": round(self.most_used / 2**30, 1),
            "gb_read_from_disks": round((psutil.disk_io_counters().read_bytes - self.read) / 1e9, 2),
            "driver_cpu_share_of_a_core": round(sum(self.driver_s.values()) / seconds, 3),
            "driver_mib": self.driver_mib,
        }


def processes(script: str) -> Any:
    """Python processes that run a script."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if len(words) > 1 and "python" in words[0] and words[1].endswith(script):
            yield process


def submitted(
    head: Head, model: Path, store: Path, text: str, documents: int, workers: int, kill_after_shards: int | None = None
) -> dict[str, Any]:
    """Submit a capture, watch it to its end, and read its store back."""
    capture = [sys.executable, str(ROOT / "jobs" / "capture.py"), "--model", str(model), "--dataset", text]
    capture += ["--limit_documents", str(documents), "--rows_per_shard", str(ROWS_PER_SHARD), "--store", str(store)]
    capture += ["--name", "text", "--workers", str(workers), "--cpus_per_worker", "0.25"]  # the head has two
    command = [*RAY, "job", "submit", "--", *capture]
    environment = {**head.environment, "RAY_ADDRESS": head.dashboard}
    commits, first, killed = store / "text" / "expert" / "commits", None, None
    started = time.monotonic()
    with ExitStack() as stack:
        cards = [stack.enter_context(Card(index)) for index in range(torch.cuda.device_count())]
        host = stack.enter_context(Host())
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            done = len(os.listdir(commits)) if commits.is_dir() else 0
            first = first or (time.monotonic() - started if done else None)
            if kill_after_shards is not None and killed is None and done >= kill_after_shards:
                victim = next(each for each in psutil.process_iter(["cmdline"]) if is_worker(each))
                victim.kill()
                killed = done
            time.sleep(0.05)
    seconds = time.monotonic() - started
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    state = coverage(store, dataset_names(store)[0])
    times = sorted(file.stat().st_mtime for file in commits.glob("*.json"))
    status = [sys.executable, str(ROOT / "jobs" / "status.py"), str(store), "--verify"]
    subprocess.run(status, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    each = state.tokens_done / len(times)
    return {
        "workers": workers,
        "tokens": state.tokens_done,
        "shards": state.shards_total,
        "seconds": round(seconds, 1),
        "seconds_to_first_commit": round(first or seconds, 1),
        "tokens_per_s_between_first_and_last_commit": round(each * (len(times) - 1) / (times[-1] - times[0])),
        # At both ends some workers have started later or are done: the middle half shows the rate of all of them
        # together.
        "tokens_per_s_in_the_middle_half": round(middle(times) * each),
        "gpu_idle_in_the_middle_half": [
            round(card.idle(*(times[len(times) * part // 4] for part in (1, 3))), 4) for card in cards[:workers]
        ],
        "peak_gib": [round(card.peak_mib / 1024, 2) for card in cards],
        "bytes_per_s_to_the_store": round(state.bytes_done / (times[-1] - times[0])),
        "shards_done_when_one_was_killed": killed,
        **host.told,
    }


def is_worker(process: psutil.Process) -> bool:
    """Whether it is one of the capture's actors."""
    words = process.info["cmdline"] or [""]
    return words[0].startswith("ray::") and "Replica" in words[0]


def middle(times: list[float]) -> float:
    """Commits per second between the first and the third quarter of the commits."""
    low, high = len(times) // 4, 3 * len(times) // 4
    return (high - low) / (times[high] - times[low])


def over_two(model: Path, folder: Path, text: str, alone: Path) -> dict[str, Any]:
    """The same text with `--gpus_per_worker 2`, with less memory per GPU than the model needs; compares bytes."""
    found: dict[str, Any] = {"gib_of_each_card": CAP_GIB}
    for gpus in (1, 2):
        store = folder / f"over-{gpus}.zarr"
        capture = ["--local", "--model", str(model), "--dataset", text, "--limit_documents", "40", "--name", "text"]
        capture += ["--rows_per_shard", str(ROWS_PER_SHARD), "--store", str(store), "--gpus_per_worker", str(gpus)]
        started = time.monotonic()
        with Card(0) as one, Card(1) as other:
            done = subprocess.run([sys.executable, "-c", LIMITED, *capture], cwd=ROOT, capture_output=True, text=True)
        found[f"on_{gpus}"] = {
            "status": done.returncode,
            "seconds": round(time.monotonic() - started, 1),
            "last_line": done.stderr.strip().splitlines()[-1][-300:],
            "peak_gib": [round(card.peak_mib / 1024, 2) for card in (one, other)],
        }
    here, there = objects(folder / "over-2.zarr"), objects(alone)
    routes = {key: data for key, data in here.items() if key.startswith(("text/expert/c/", "text/weight/c/"))}
    last = max(
        int(key.split("/")[3]) for key in routes
    )  # the last shard is not full, and continues in the longer capture
    equal = [there[key] == data for key, data in routes.items() if int(key.split("/")[3]) < last]
    return found | {"objects_compared_with_one_card_s": len(equal), "equal": sum(equal)}


def main() -> None:
    """Make the model, submit, kill, place over two, write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--text", default=str(Path(torch.__file__).parent / "**" / "*.py"), help="a --dataset")
    parser.add_argument("--documents", type=int, default=125, help="for each GPU")
    parser.add_argument("--folder", type=Path, help="where model and stores go")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpus": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}",
        "cpu_cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "zarr", "ray")},
        "layers": options.layers,
        "command": " ".join(["python", "tests/benchmarks/gpu_many.py", *sys.argv[1:]]),
    }

    def keep(name: str, value: Any) -> None:
        result[name] = value
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(value), flush=True)

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        model = folder / "mixtral"
        started = time.monotonic()
        make_checkpoint(model, options.layers, "nf4", None, 0)
        keep("checkpoint", {"gb": round(checkpoint_gb(model), 2), "seconds": round(time.monotonic() - started, 1)})
        torch.cuda.empty_cache()
        drop_from_cache(model, "*.safetensors")
        numbers = [number for number in (8, 4, 2, 1) if number <= options.gpus]
        with ray_head(ROOT, PYTHONPATH=os.environ.get("PYTHONPATH", "")) as head:
            for number in numbers:
                store = folder / f"{number}.zarr"
                ran = submitted(head, model, store, options.text, options.documents * number, number)
                keep(f"on_{number}", ran)
            one = result["on_1"]["tokens_per_s_in_the_middle_half"]
            rates = {number: result[f"on_{number}"]["tokens_per_s_in_the_middle_half"] for number in numbers}
            keep("efficiency", {number: round(rate / number / one, 3) for number, rate in rates.items()})
            if torch.cuda.device_count() > 1:
                keep("over_two", over_two(model, folder, options.text, folder / "1.zarr"))
            most, again = numbers[0], folder / "killed.zarr"
            shards = result[f"on_{most}"]["shards"]
            killed = submitted(head, model, again, options.text, options.documents * most, most, shards // 3)
            killed["bytes_equal_to_the_quiet_run"] = objects(again) == objects(folder / f"{most}.zarr")
            keep("killed", killed)


if __name__ == "__main__":
    main()
