"""`--dry_run`, a capture and `jobs/quantize.py` of every family: `make families`, by hand, CPU only.

Each family's tiny checkpoint, with a tokenizer of ASCII letters, goes through the commands like a user's. The output of
`jobs/quantize.py` is captured, and its choices and weights must be bit-identical to a capture in NF4 of the original.
The experts are packed in common tensors if there are 16, as in models with more, or if they are published in this form.

The outcome is `results/families-commands.json`: for each precision the dry run's estimate of a GPU's memory, or the
reason for the rejection; and for the quantized checkpoint "equal", or the reason for the rejection.
"""

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (HERE.parents[1], HERE.parent, HERE))

from families_runs import on_every_family  # noqa: E402
from tiny_families import VOCABULARY, make_checkpoint  # noqa: E402

from jobs import capture, quantize  # noqa: E402
from store import open_capture  # noqa: E402
from workers.models import saving  # noqa: E402
from workers.shard import RoutingError  # noqa: E402

PRECISIONS = ("none", "nf4")
TEXT = "The expert that a token meets depends on the token. " * 8
RESULT = HERE / "results" / "families-commands.json"
EQUAL, DIFFERS = "equal", "differs"


def commands(model_type: str) -> dict[str, str]:
    """The outcome of each command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not make_checkpoint(model_type, folder / "own"):
            return {}
        write_tokenizer(folder / "own")
        (folder / "text.txt").write_text(TEXT)
        found = {kind: _captured(folder, "own", kind) for kind in PRECISIONS}
        found["quantized"] = _quantized(folder)
    return {what: told.replace(name, "") for what, told in found.items()}


def write_tokenizer(folder: Path) -> None:
    """One token per ASCII letter."""
    letters = {chr(number): number for number in range(VOCABULARY)}
    Tokenizer(models.BPE(letters, [])).save(str(folder / "tokenizer.json"))


def _captured(folder: Path, model: str, quantization: str) -> str:
    """Estimate and capture; returns the estimate of a GPU's memory."""
    options = ("--local", "--model", folder / model, "--dataset", folder / "text.txt", "--quantization", quantization)
    options = (*options, "--sequence_length", "32", "--store", folder / f"{model}-{quantization}")
    try:
        said = _run(capture.main, *options, "--dry_run", "--device", "cuda")
        _run(capture.main, *options, "--device", "cpu")
    except (ValueError, RoutingError) as error:
        return f"rejected: {' '.join(str(error).split())}"
    [memory] = re.findall(r"device memory +│ (.*?) *│", said)
    return str(memory)


def _quantized(folder: Path) -> str:
    """Whether the checkpoint written by `jobs/quantize.py` gives the routes of the original in NF4."""
    for single in (8, 0):  # up to so many experts are written one by one; each family has its own process
        saving.PUBLISHED = single
        try:
            _run(quantize.main, folder / "own", folder / "quantized", "--device", "cpu")
            break
        except ValueError as error:
            told = " ".join(str(error).split())
            if single == 0 or "as one tensor" not in told:
                return f"rejected: {told}"
    if (told := _captured(folder, "quantized", "nf4")).startswith("rejected"):
        return f"{DIFFERS}: {told}"
    one, other = (open_capture(folder / f"{model}-nf4", "text") for model in ("own", "quantized"))
    same = all(np.array_equal(one[name].values, other[name].values) for name in ("token", "expert", "weight"))
    return EQUAL if same else DIFFERS


def _run(main: Callable[[list[str]], int], *arguments: object) -> str:
    """The output of a command, which must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        status = main(list(map(str, arguments)))
    assert status == 0, (status, arguments)
    return out.getvalue()


def main() -> None:
    """Run the commands on all families, and fail if one crashes or differs."""
    wrong = [
        model_type
        for model_type, found in on_every_family(RESULT, __doc__, commands)
        if "crashed" in found or any(told.startswith(DIFFERS) for told in found.values())
    ]
    if wrong:
        sys.exit(f"{len(wrong)} families end in what must not be: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
