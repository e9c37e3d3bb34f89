"""What is changed about a model's choices, built from the options. Imports nothing heavy.

E experts, k choices. Experts are named LAYER:EXPERT, where each side is a number, a range (3-5, both ends included), or
\\* for all. Layers have the model's own numbers.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Named = str | tuple[int, int]
"""Experts by name, or one as (layer, expert)."""

LOGITS_OF = "each router before its choices were changed"
_SIDE = re.compile(r"\*|\d+(-\d+)?")


@dataclass(frozen=True, kw_only=True)
class Interventions:
    """What is changed. The fields are part of a capture's identity."""

    mask: tuple[str, ...] = ()
    """Experts that are never chosen, as LAYER:EXPERT."""
    force: tuple[str, ...] = ()
    """Experts that are always among the chosen."""
    top_k: int | None = None
    """Experts per token, if it is not the model's own number."""
    routes_from: str | None = None
    """The hash of the identity of the capture that gives the choices."""
    routes_weights: bool = False
    """Whether that capture gives the weights too."""

    def fields(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def told(self, transformation: str) -> dict[str, Any]:
        """Attributes that say what recorded logits are and how weights are computed from them; see `store.Layout`.

        Parameters
        ----------
        transformation
            How weights are computed without a change.
        """
        if self == Interventions():
            return {"router_transformation": transformation}
        other = self.routes_weights or (self.mask and transformation == "softmax")  # the softmax is over what is left
        return {"router_transformation": "unknown" if other else transformation, "logits_of": LOGITS_OF}

    def masked(self) -> dict[int, list[int]]:
        """The experts of each layer that are never chosen."""
        return _by_layer(self.mask)

    def forced(self) -> dict[int, list[int]]:
        """The experts of each layer that are always chosen."""
        return _by_layer(self.force)


def what_to_change(
    mask: Sequence[Named],
    force: Sequence[Named],
    top_k: int | None,
    *,
    layers: Sequence[int],
    num_experts: int,
    experts_per_token: int,
) -> Interventions:
    """The requested interventions.

    Parameters
    ----------
    mask, force
        Experts, each by name or as (layer, expert).
    top_k
        Experts per token; None: the model's own number.
    layers
        The model's own numbers of the layers that have experts, ascending.
    num_experts, experts_per_token
        E and k.

    Raises
    ------
    ValueError
        When an expert or a layer does not exist, an expert is both masked and forced, or a layer is left unable to
        choose k experts.
    """
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(f"--top_k is {top_k}, but must be 1 to {num_experts}, the number of experts")
    k = top_k or experts_per_token
    masked, forced = (
        sorted({pair for each in given for pair in _pairs(option, each, layers, num_experts)})
        for option, given in (("--mask", mask), ("--force", force))
    )
    if both := sorted({*masked} & {*forced}):
        raise ValueError(f"{_name(both[0])} is given with both --mask and --force: use only one of them")
    for layer in layers:
        left = num_experts - sum(one == layer for one, _ in masked)
        if left < k:
            raise ValueError(
                f"--mask leaves {left} of {num_experts} experts at layer {layer}, but {k} are chosen for each token:"
                " mask fewer, or choose fewer with --top_k"
            )
        if (many := sum(one == layer for one, _ in forced)) > k:
            raise ValueError(
                f"--force gives {many} experts at layer {layer}, but {k} are chosen for each token: force fewer, or"
                " choose more with --top_k"
            )
    return Interventions(
        mask=tuple(map(_name, masked)),
        force=tuple(map(_name, forced)),
        top_k=None if top_k == experts_per_token else top_k,
    )


def layers_named(names: Sequence[str], layers: Sequence[int]) -> list[int]:
    """The named layers, ascending; each name is a number or a range. All layers if none is named.

    Raises
    ------
    ValueError
        When a name is not valid, or a layer does not exist.
    """
    for name in names:
        if not _SIDE.fullmatch(name):
            raise ValueError(f"--layers {name!r:.80} is not a layer: give a number or a range, such as 3 or 3-5")
    return sorted({layer for name in names or ["*"] for layer in _numbers(f"--layers {name}", "layer", name, layers)})


def experts_in_file(option: str, path: Path) -> list[str]:
    """The experts in a JSON file: an object of layers, each with a list of experts, as ``{"7": [1, 3]}``.

    Raises
    ------
    ValueError, OSError
        When the file cannot be read or holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{option} {path} is not JSON: {error}") from error
    right = isinstance(held, dict) and all(
        layer.isdecimal()
        and isinstance(numbers, list)
        and all(type(number) is int and number >= 0 for number in numbers)
        for layer, numbers in held.items()
    )
    if not right:
        raise ValueError(
            f"{option} {path} holds {json.dumps(held)[:80]}, but must hold layers with lists of experts, such as"
            ' {"7": [1, 3]}'
        )
    return [f"{layer}:{number}" for layer, numbers in held.items() for number in numbers]


def _pairs(option: str, named: Named, layers: Sequence[int], num_experts: int) -> list[tuple[int, int]]:
    """Every (layer, expert) that a name stands for."""
    text = named if isinstance(named, str) else ":".join(map(str, named))
    sides = text.split(":")
    if len(sides) != 2 or not all(_SIDE.fullmatch(side) for side in sides):
        raise ValueError(
            f"{option} {text!r:.80} is not LAYER:EXPERT: give numbers, ranges or *, such as 7:1, 3-5:0-2 or *:1"
        )
    found = [
        _numbers(f"{option} {text}", *side)
        for side in zip(("layer", "expert"), sides, (layers, range(num_experts)), strict=True)
    ]
    return [(layer, expert) for layer in found[0] for expert in found[1]]


def _numbers(given: str, what: str, side: str, there: Sequence[int]) -> list[int]:
    """The numbers that a side names, which must exist."""
    if side == "*":
        return list(there)
    first, _, last = side.partition("-")
    ends = [int(first), int(last or first)]
    for end in ends:
        if end not in there:
            kind = "layers with experts" if what == "layer" else "experts of each layer"
            raise ValueError(f"{given}: there is no {what} {end}; the {kind} are {_listed(there)}")
    if ends[0] > ends[1]:
        raise ValueError(f"{given}: the range {side} ends before it starts")
    return [number for number in there if ends[0] <= number <= ends[1]]


def _listed(numbers: Sequence[int]) -> str:
    """The numbers as text, as a range if no number is missing."""
    without_gaps = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if without_gaps else ", ".join(map(str, numbers))


def _name(pair: tuple[int, int]) -> str:
    return f"{pair[0]}:{pair[1]}"


def _by_layer(names: Sequence[str]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, expert in (map(int, name.split(":")) for name in names):
        found.setdefault(layer, []).append(expert)
    return found
