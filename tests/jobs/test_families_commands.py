"""A family's checkpoint goes through `--dry_run`, `jobs/quantize.py` and a capture; all families: `make families`."""

import re
from pathlib import Path

import pytest

from workers.models import saving


@pytest.mark.parametrize("family", ["granitemoe"])
def test_a_quantized_checkpoint_gives_the_routes_of_its_original_and_a_dry_run_says_what_it_does_not_know(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr(saving, "PUBLISHED", saving.PUBLISHED)  # which the commands change
    from families_commands import EQUAL, commands

    found = commands(family)
    assert found.pop("quantized") == EQUAL
    for memory in found.values():
        assert re.fullmatch(
            r"more than [\d,]+ bytes on cuda, .* is computed beside the weights is not known .*", memory
        )
