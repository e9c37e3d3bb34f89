"""Write a data set card, README.md, for sharing a store.

usage: python jobs/card.py STORE[/DATASET] --license LICENSE [options]

Examples:
  python jobs/card.py demo.zarr --license cc-by-4.0
  python jobs/card.py demo.zarr/demo-code --license apache-2.0 -o card.md
  python jobs/card.py demo.zarr --license other --address hf://datasets/ORGANIZATION/NAME

Options:
  --license LICENSE         licence of the shared data, in the hub's notation
  --address ADDRESS         where the store will be, in the form that xarray opens
  --title TITLE             the title (routes of the model)
  --output FILE, -o FILE    the card (README.md in the store)

docs/options.md explains every option. Exit status: 0 written, 2 there is no such store.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import start

start(__name__, __doc__)

import tyro

from jobs.console.arguments import parse
from jobs.console.places import captures_at, refuse_no_file
from jobs.console.terminal import log, run_job, shown
from store.files import whole_file


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Write README.md for sharing a store, from the metadata of its captures.

    It lists the model, its revision and quantization, tokens, arrays, how the routes were made, and how to read them
    with xarray. Then upload the folder with the hub's own command: hf upload ORGANIZATION/NAME STORE . --repo-type
    dataset. Prints the path of the file. Exit status: 0 written, 2 when there is no such store.
    """

    place: Annotated[str, tyro.conf.Positional]
    """STORE, or STORE/DATASET for one of its data sets; the store is a folder, or s3://bucket/prefix."""
    license: str
    """The licence of the shared data, in the hub's notation: cc-by-4.0, other. The licence of the text applies, because
    the text can be read back from the tokens."""
    address: str = "hf://datasets/ORGANIZATION/NAME"
    """Where the store will be, in the form that xarray opens."""
    title: str | None = None
    """The title. Default: routes of the model."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file to write; an existing one is replaced. Default: README.md in the store."""


def main(arguments: list[str]) -> int:
    """Write the card and print its path."""
    config = parse(CardConfig, "card", arguments)
    store, names = captures_at(config.place)
    output = config.output or _in(store)
    refuse_no_file("output", output)

    from analysis.report.card import Shared, card  # xarray takes a second: --help must not wait for it
    from store import CaptureGroup, attributes, coverage
    from store.reader import open_covered

    captures = []
    for name in names:
        state = coverage(store, name)
        attrs = attributes(open_covered(store, state))
        arrays = list(CaptureGroup(store, name).layout.arrays())
        captures.append(Shared(name=name, state=state, attrs=attrs, arrays=arrays))
        if not state.complete:
            log(shown(f"note: {state}"))
    models = dict.fromkeys(str(each.attrs.get("model", "an unknown model")) for each in captures)
    beside = "report.html" if (output.parent / "report.html").is_file() else None
    title = config.title or f"Expert routes of {' and '.join(models)}"
    text = card(captures, title=title, licence=config.license, address=config.address, report=beside)
    with whole_file(output) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    print(output.absolute())
    return 0


def _in(store: str) -> Path:
    if "://" in store:
        raise ValueError(f"{store} is not a folder on this machine: use --output to name the file to write")
    return Path(store) / "README.md"


if __name__ == "__main__":
    run_job(main)
