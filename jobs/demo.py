"""The demo: two contrasting texts through a tiny Mixtral on the CPU, and a report. `make demo` runs it.

It does nothing that the commands it prints do not: capture, then report, in this folder.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORE, REPORT = ROOT / "demo.zarr", ROOT / "demo.html"
# Documents of very different length: so many make about 150,000 tokens of each text.
TEXTS = {"demo:prose": 14, "demo:code": 44}
OPTIONS = (
    "--local",
    "--model",
    "tiny",
    "--quantization",
    "none",
    "--device",
    "cpu",
    "--sequence_length",
    "512",
)


def main() -> int:
    """Capture and report; the status of the first command that fails, else 0."""
    started = time.monotonic()
    for text, documents in TEXTS.items():
        options = ("--limit_documents", str(documents), "--rows_per_shard", "64", "--store", str(STORE))
        if status := _run("capture.py", "--dataset", text, *OPTIONS, *options):
            return status
    if status := _run("report.py", str(STORE), "-o", str(REPORT)):
        return status
    python = Path(sys.executable)
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    print(f"""
The demo took {time.monotonic() - started:.0f} s. The report: {REPORT}
What to type next:
  {python} jobs/status.py demo.zarr
  {python} -c "import store; print(store.open_capture('demo.zarr', 'demo-prose'))"
  {python} jobs/capture.py --local --model tiny --dataset README.md --store demo.zarr""")
    return 0


def _run(script: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, str(ROOT / "jobs" / script), *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the script that ran has said so
        sys.exit(130)
