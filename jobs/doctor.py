"""Check imported or captured routes for known faults, and report them with evidence.

usage: python jobs/doctor.py STORE/DATASET [options]

Examples:
  python jobs/doctor.py served.zarr/chat
  python jobs/doctor.py served.zarr/chat --against own.zarr/chat
  python jobs/doctor.py served.zarr/chat --recapture 20

Compare with something else, because routes in the right form may belong to another model:
  --against STORE/DATASET   a capture of the same tokens by this project
  --recapture N             run the model here on the first N documents
  --model MODEL             with --recapture: a folder, a hub id or tiny (the capture's)
  --quantization KIND       with --recapture: nf4, fp4, mxfp4, fp8, int8 or none
  --batch_tokens N          with --recapture: most padded tokens in a micro-batch (8192)

Output:
  --json                    one JSON document, for scripts; docs/json.md names its keys

docs/importing.md lists the known faults, docs/options.md explains every option.
Exit status: 0 no fault found, 1 a fault found, 2 the capture cannot be examined.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

import tyro

from jobs.console.arguments import parse
from jobs.console.places import capture_at
from jobs.console.tables import print_json, print_line, stdout_console
from jobs.console.terminal import log, reporting, run_job, say_next, shown

if TYPE_CHECKING:
    import xarray as xr

    from analysis.doctor.alignment import Alignment, Texts
    from analysis.doctor.faults import Finding

NOTHING = "no fault found in the routes alone"


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check for known faults in routes returned by engines, and report them with layers, rows and evidence.

    Known faults: layers of zeros; counted dense layers; constant, equal and shifted layers; experts out of range or
    twice in a token; rows that repeat an earlier batch; padding and special tokens; dummy last tokens; a different
    top-k; weights with a wrong sum or order; loads that no trained router has; generated tokens that restart. Finding
    no fault is not a proof: routes in the right form may belong to another model, which --against or --recapture shows.
    Exit status: 0 no fault found, 1 a fault found, 2 the capture cannot be examined.
    """

    place: Annotated[str, tyro.conf.Positional]
    """The routes, as STORE/DATASET: demo.zarr/demo-prose, or s3://bucket/routes.zarr/imported."""
    against: str | None = None
    """A capture of the same tokens by this project, as STORE/DATASET. Reports the best shift in position and layer, the
    agreement there, and how much of the rest near-ties explain. Documents are compared by their first rows."""
    recapture: int | None = None
    """Instead of --against: run the model here on the first so many documents (at most 16,384 tokens), and compare."""
    model: str | None = None
    """With --recapture: the checkpoint, a folder, a hub id or "tiny". Default: the capture's."""
    quantization: Literal["nf4", "fp4", "mxfp4", "fp8", "int8", "none"] | None = None
    """With --recapture: precision of the weights. Default: as stored, otherwise nf4 on a GPU."""
    batch_tokens: int = 8192
    """With --recapture: the most padded tokens in a micro-batch."""
    json: bool = False
    """One JSON document on standard output, for scripts: docs/json.md names its keys."""


def main(arguments: list[str]) -> int:
    """Examine the routes, and print the faults."""
    config = parse(DoctorConfig, "doctor", arguments)
    if config.against is not None and config.recapture is not None:
        raise ValueError("give --against or --recapture, not both")
    if config.recapture is not None and config.recapture < 1:
        raise ValueError(f"--recapture {config.recapture}: must be at least 1")

    from analysis.doctor.examination import examine  # numba takes a second: --help must not wait for it
    from store import coverage
    from store.reader import open_covered

    store, name = capture_at(config.place)
    state = coverage(store, name)
    capture = open_covered(store, state)
    if not state.complete:
        log(shown(f"note: {state}"))
    with reporting("examine", unit="shards", transient=True) as report:
        found = examine(capture, progress=lambda done, total: report.to(done))
    compared = _compare(config, capture)
    wrong = bool(found) or (compared is not None and not compared.verdict.startswith("agrees"))
    if config.json:
        findings = [asdict(finding) for finding in found]
        comparison = None if compared is None else asdict(compared)
        told = {"capture": config.place, "tokens_examined": state.tokens_done}
        print_json({**told, "findings": findings, "comparison": comparison})
        return int(wrong)
    console = stdout_console()
    for finding in found:
        print_line(console, _headline(finding), style="red")
        print_line(console, f"  {finding.evidence}")
    if not found:
        print_line(console, f"{NOTHING}: {state.tokens_done:,} tokens were examined")
    if compared is not None:
        for line in _in_words(compared):
            print_line(console, line)
    if not wrong:
        say_next(command_line("explore", config.place), command_line("report", config.place))
    return int(wrong)


def _headline(finding: "Finding") -> str:
    """The fault, and where."""
    layers, rows = finding.layers, finding.rows
    parts = [f"layer{'s' * (len(layers) > 1)} {_listed(layers, 8)}"] * bool(layers)
    parts += [f"first in row{'s' * (len(rows) > 1)} {_listed(rows, 5)}"] * bool(rows)
    return f"{finding.fault}{': ' if parts else ''}{'; '.join(parts)}"


def _listed(values: Sequence[int], most: int) -> str:
    """Numbers, as a range if they are consecutive."""
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:most])) + ", ..." * (len(values) > most)


def _in_words(found: "Alignment") -> list[str]:
    """A comparison, as lines."""
    at = "without a shift"
    if (found.position, found.layer) != (0, 0):
        at = f"at a shift of {found.position:+d} tokens and {found.layer:+d} layers ({found.unshifted:.1%} without)"
    lines = [
        f"verdict: {found.verdict}",
        f"{found.agreement:.2%} of the choices are the same {at}, of {found.tokens:,} tokens of {found.documents:,}"
        f" documents; {found.chance:.1%} is expected by chance",
    ]
    if found.differing:
        why = "near-ties cannot be identified, because there are no weights"
        if found.explained is not None:
            why = (
                f"near-ties explain {found.explained:.1%} of them: at the first difference, only the choice with the"
                " smallest weight differs"
            )
        lines.append(f"{found.differing:,} tokens differ at one layer or more; {why}")
    return lines


def _compare(config: DoctorConfig, capture: "xr.Dataset") -> "Alignment | None":
    """The routes compared with a capture, or with the model itself."""
    if config.against is None and config.recapture is None:
        return None

    from analysis.doctor.alignment import align, first_rows
    from store import open_capture

    own = first_rows(capture, config.recapture)
    if config.against is not None:
        reference = first_rows(open_capture(*capture_at(config.against)))
    else:
        reference = _recaptured(config, own, str(capture.attrs.get("model", "")))
    return align(own, reference, int(capture.attrs["num_experts"]))


def _recaptured(config: DoctorConfig, own: "Texts", model: str) -> "Texts":
    """The model's choices for the same tokens, computed now."""
    import numpy as np
    import torch

    from analysis.doctor.alignment import Texts
    from store.layout import Layout
    from store.plan import Rows
    from workers.engine import ModelEngine
    from workers.models.loading import load_model
    from workers.models.stored import default_quantization
    from workers.shard import route_rows
    from workers.tiny import tiny_checkpoint

    path = tiny_checkpoint() if config.model is None and model == tiny_checkpoint().name else _path(config, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantization = config.quantization or default_quantization(path, None, device)
    engine = ModelEngine(load_model(path, quantization=quantization, device=device))
    layout = Layout(
        sequence_length=own.token.shape[1],
        rows_per_shard=len(own.token),
        layers=engine.layers,
        num_experts=engine.num_experts,
        experts_per_token=engine.experts_per_token,
        vocab_size=max(1, int(own.token.max()) + 1),
    )
    rows = Rows(token=own.token.astype(np.int32), length=(own.token >= 0).sum(1).astype(np.int32))
    with reporting("recapture", total=int(rows.length.sum()), transient=True) as report:
        routes = route_rows(engine, rows, layout, config.batch_tokens)()
        report.to(int(rows.length.sum()))
    expert = routes["expert"].astype(np.int32)
    return Texts(
        layers=list(engine.layers),
        document=own.document,
        token=own.token,
        expert=np.where(expert == layout.missing_expert, -1, expert),
        weight=routes["weight"].astype(np.float32),
    )


def _path(config: DoctorConfig, model: str) -> Path | str:
    from workers.tiny import model_path

    try:
        return model_path(config.model or model)
    except ValueError as error:
        raise ValueError(f"{error}; use --model to name the checkpoint") from error


if __name__ == "__main__":
    run_job(main)
