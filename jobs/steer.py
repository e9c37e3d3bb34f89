"""Mask the experts that one data set uses more than another, and measure the effect on both.

usage: python jobs/steer.py STORE/DATASET STORE/DATASET [options]

Examples:
  python jobs/steer.py demo.zarr/demo-code demo.zarr/demo-legal --local
  python jobs/steer.py demo.zarr/demo-code demo.zarr/demo-legal --local --experts 4 --force
  python jobs/steer.py demo.zarr/demo-code demo.zarr/demo-legal --only_name --write code.json

What to change:
  --experts N               the most experts, those with the largest difference (8)
  --force                   choose them for every token, instead of never
  --write FILE              the experts, for --mask_file or --force_file of a capture
  --only_name               print the experts and stop

The captures under the change:
  --into STORE              the output (the store's name with -without-DATASET or -with-DATASET)
  --local                   in this process, on one device, without Ray
  also --device --workers --gpus_per_worker

Output:
  --json                    one JSON document, for scripts; docs/json.md names its keys

Both data sets are captured again with the same options except for the change, and compared with
the originals, which need --record logprob. Run the same command again to resume.
docs/options.md explains every option. Exit status: 0 done, 1 a capture is not complete,
2 an error, 3 only quarantined shards are missing, 130 or 143 interrupted.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

import tyro

from jobs.capture import carry_out
from jobs.capturing.options import CaptureConfig, as_begun, take_hub_token
from jobs.console.arguments import parse
from jobs.console.effect_rows import effects_told, print_effects
from jobs.console.places import capture_at, refuse_no_file
from jobs.console.steer_rows import carriers_told, print_carriers, print_steered
from jobs.console.tables import Facts, print_json, stdout_console
from jobs.console.terminal import run_job, say_next
from store.files import whole_file

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """Find the experts that one data set uses more than another, beyond chance, and measure the effect on both data
    sets when the model cannot choose them.

    Both data sets are captured again with the same options except for the change, into a separate store, and the effect
    on the log-probability of their tokens is reported, with its difference between the two. Exit status: 0 done, 1 a
    capture is not complete, 2 the command is wrong, 3 only quarantined shards are missing, 130 or 143 interrupted.
    """

    one: Annotated[str, tyro.conf.Positional]
    """The data set whose experts are changed, as STORE/DATASET, captured with --record logprob."""
    other: Annotated[str, tyro.conf.Positional]
    """The data set that it is compared with."""
    experts: int = 8
    """The most experts: those whose share of tokens differs most, among those that differ by more than chance. Each
    layer keeps as many as a token chooses."""
    force: bool = False
    """Force the experts to be among the choices of every token, instead of masking them; at most as many per layer as a
    token chooses."""
    write: Path | None = None
    """Write the experts as a JSON file, for --mask_file or --force_file of jobs/capture.py."""
    only_name: bool = False
    """Print the experts, without capturing."""
    into: str | None = None
    """Store of the captures under the change. Default: the first store's name with -without-DATASET, or -with-DATASET
    if experts are forced."""
    local: bool = False
    """Capture in this process, on one device, without Ray."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the model, as for a capture."""
    workers: int | None = None
    """Copies of the model on a cluster, as for a capture."""
    gpus_per_worker: float = 1.0
    """GPUs per worker, as for a capture."""
    json: bool = False
    """One JSON document on standard output, for scripts: docs/json.md names its keys."""

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"--experts is {self.experts}, but must be at least 1")
        if self.write is not None:
            refuse_no_file("write", self.write)

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two data sets."""
        return capture_at(self.one)[1], capture_at(self.other)[1]

    @property
    def store(self) -> str:
        """The store of the captures under the change."""
        path, name = capture_at(self.one)
        changed = f"{path.removesuffix('.zarr')}-{'with' if self.force else 'without'}-{name}.zarr"
        return CaptureConfig(store=changed if self.into is None else self.into).store_path


def main(arguments: list[str]) -> int:
    """Print the experts, capture without them, and report the effect."""
    config = parse(SteerConfig, "steer", arguments)
    take_hub_token()

    from store import open_capture  # takes a second: --help must not wait for it

    if config.names[0] == config.names[1]:
        raise ValueError(f"{config.one} and {config.other} have the same name: use two data sets with different names")
    captures = {place: open_capture(*capture_at(place)) for place in (config.one, config.other)}
    told: dict[str, Any] = {"one": config.one, "other": config.other, "change": "force" if config.force else "mask"}
    told |= carriers_told(captures, config.experts, forced=config.force)
    experts = [(row["layer"], row["expert"]) for row in told["experts"]]
    if config.write is not None:
        _write(config.write, experts)
    if not config.json:
        print_carriers(stdout_console(), told)
    if not config.only_name:
        for each in [_again(config, place, capture, experts) for place, capture in captures.items()]:
            if status := carry_out(each):
                return status
        told |= {"into": config.store, **_effects(config, captures.values())}
    if config.json:
        print_json(told)
    elif config.only_name:
        _say_how_to_capture(config, experts)
    else:
        print_effects(stdout_console(), told)
        print_steered(stdout_console(), told)
        say_next(
            command_line("report", config.store),
            command_line("compare", config.one, f"{config.store}/{config.names[0]}"),
        )
    return 0


def _again(config: SteerConfig, place: str, capture: "xr.Dataset", experts: list[tuple[int, int]]) -> CaptureConfig:
    """The options that capture a data set again, with the experts masked or forced."""
    from store import attributes

    if "logprob" not in capture:
        raise ValueError(f"{place} did not record log-probabilities: capture it with --record logprob")
    where = {field: getattr(config, field) for field in ("local", "device", "workers", "gpus_per_worker")}
    begun = as_begun(
        attributes(capture),
        capture_at(place)[1],
        store=config.store,
        record=("logprob",),
        top_logits=None,
        **where,
    )
    more = tuple(f"{layer}:{expert}" for layer, expert in experts)
    change = "force" if config.force else "mask"
    changes: dict[str, Any] = {change: (*getattr(begun, change), *more)}
    wanted = replace(begun, **changes)
    _refuse_other_change(wanted)
    return wanted


def _refuse_other_change(wanted: CaptureConfig) -> None:
    """Raise if the store has a capture of the same name under another change."""
    from store import CaptureGroup
    from store.identity import changes_in_words

    try:
        attrs = CaptureGroup(wanted.store_path, wanted.name[0]).attrs
    except FileNotFoundError:
        return
    if any(set(attrs.get(name) or ()) != set(getattr(wanted, name)) for name in ("mask", "force")):
        change = changes_in_words(attrs) or "no change"
        raise ValueError(f"{wanted.store_path}/{wanted.name[0]} has {change}: use --into to name another store")


def _effects(config: SteerConfig, captures: "Iterable[xr.Dataset]") -> Facts:
    """The effect of the change on the predictions of both."""
    from analysis.scanning import EVERYTHING
    from store import open_capture

    changed = [open_capture(config.store, name) for name in config.names]
    pairs = dict(zip(config.names, zip(captures, changed, strict=True), strict=True))
    return effects_told(pairs, EVERYTHING)


def _write(file: Path, experts: list[tuple[int, int]]) -> None:
    by_layer = {
        str(layer): sorted(e for at, e in experts if at == layer) for layer in sorted({at for at, _ in experts})
    }
    with whole_file(file) as path:
        path.write_text(json.dumps(by_layer) + "\n", encoding="utf-8")


def _say_how_to_capture(config: SteerConfig, experts: list[tuple[int, int]]) -> None:
    option = "--force" if config.force else "--mask"
    words = [word for layer, expert in experts for word in (option, f"{layer}:{expert}")]
    given = [f"{option}_file", config.write] if config.write is not None else words
    say_next(command_line("capture", "--record", "logprob", *given))


if __name__ == "__main__":
    run_job(main)
