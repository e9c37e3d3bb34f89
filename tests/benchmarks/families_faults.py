"""Four faults of a recorder in every family, unquantized and in NF4: `make families`, by hand, CPU only.

Each fault of `tests/router_faults.py` is planted in an engine of the family's tiny model. It is found if a
`RoutingError` ends the micro-batch; harmless if the same is recorded as without it; or not noticed, which must not
happen. A model in which only one layer has experts has no other layer for which it could be mistaken.

The outcome is `results/families-faults.json`.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (HERE.parents[1], HERE.parent, HERE))

from families_runs import on_every_family  # noqa: E402
from router_faults import FAULTS, NOT_NOTICED, batch, outcome  # noqa: E402
from tiny_families import make_checkpoint  # noqa: E402

from workers.engine import load_engine  # noqa: E402
from workers.shard import RoutingError  # noqa: E402

PRECISIONS = ("none", "nf4")
RESULT = HERE / "results" / "families-faults.json"


def faults(model_type: str) -> dict[str, Any]:
    """The outcome of each fault in each precision in which the family is captured; other precisions are "rejected"."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if not make_checkpoint(model_type, Path(folder)):
            return {}
        for quantization in PRECISIONS:
            try:
                engine = load_engine(Path(folder), device="cpu", quantization=quantization)
                wanted = engine.route(*batch(2))
            except (ValueError, RoutingError):
                found[quantization] = "rejected"
                continue
            found[quantization] = {fault: _short(outcome(engine, plant, wanted)) for fault, plant in FAULTS.items()}
    return found


def _short(told: str) -> str:
    """Without the first token that shows it, and without its possible causes."""
    return re.sub(r"(, but of an earlier batch or another layer)?(, first seen at position \d+)?$", "", told, count=1)


def main() -> None:
    """Plant all faults, and fail if one is not noticed."""
    unnoticed = [
        f"{model_type} ({quantization}): {fault}"
        for model_type, found in on_every_family(RESULT, __doc__, faults)
        for quantization, each in found.items()
        for fault, told in (each.items() if isinstance(each, dict) else ())
        if told == NOT_NOTICED
    ]
    if unnoticed:
        sys.exit(f"{len(unnoticed)} faults were not noticed: {'; '.join(unnoticed)}")


if __name__ == "__main__":
    main()
