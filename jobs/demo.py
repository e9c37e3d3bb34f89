"""The demo: four contrasting texts through a tiny Mixtral on the CPU, and a report. `make demo` runs it.

It does nothing that the commands it prints do not: capture, then report, in this folder. The texts are those that were
held out when the model was trained.
"""

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs import capture, report
from jobs.terminal import run_job

ROOT = Path(__file__).resolve().parent.parent
STORE, REPORT = ROOT / "demo.zarr", ROOT / "demo.html"
# Documents of very different length: so many make about 100,000 tokens of each text.
TEXTS = {"demo:prose": 9, "demo:code": 29, "demo:legal": 67, "demo:maths": 35}
MODEL = "--local --model tiny --quantization none --device cpu --sequence_length 512 --rows_per_shard 64"


def main(arguments: list[str]) -> int:
    """Capture and report; the status of the first job that fails, else 0."""
    if arguments:
        raise ValueError(f"the demo has no options, and {arguments[0]!r} was given: python jobs/capture.py has them")
    started = time.monotonic()
    for text, documents in TEXTS.items():
        options = ["--dataset", text, "--limit_documents", str(documents), "--store", str(STORE)]
        if status := capture.main([*options, *MODEL.split()]):
            return status
    if status := report.main([str(STORE), "-o", str(REPORT)]):
        return status
    python = Path(sys.executable)
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    print(f"""
The demo took {time.monotonic() - started:.0f} s. The report: {REPORT}
What to type next:
  {python} jobs/status.py demo.zarr
  {python} jobs/query.py demo.zarr/demo-code --token "▁return" --layer 2
  {python} -c "import store; print(store.open_capture('demo.zarr', 'demo-code'))"
  {python} jobs/capture.py --local --model tiny --dataset README.md --store demo.zarr""")
    return 0


if __name__ == "__main__":
    run_job(main)
