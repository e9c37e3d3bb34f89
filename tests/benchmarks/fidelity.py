"""Do 4-bit experts route like their own dequantized weights? `python tests/benchmarks/fidelity.py -o RESULT.json`.

At Mixtral 8x7B's full width, random weights, on a GPU. The reference is written here, layer by layer, from the plain
formulas: each 4-bit matrix dequantized by bitsandbytes, every product, the attention and the norms in float32. Both get
the same hidden states at each layer, because a random model amplifies rounding: after some layers two roundings of one
model have nothing in common. A different choice is reported with its margin: the reference's logit of its k-th expert
minus that of the next. Also measured: a row alone compared with the same row in a full batch, whether two runs are
bit-identical, and the accumulated difference without corrections in between.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from expert_matrices import expert_matrices, linear_matrix  # noqa: E402
from full_size import WIDTH, full_size_model  # noqa: E402

from workers.models.decoder import MixtralForward  # noqa: E402

full, matrices = linear_matrix, expert_matrices
"""What gives the values of a Linear's matrix, and of each expert's gate, up and down, in float32."""
CHOICES, HEADS, GROUPS = 2, WIDTH["num_attention_heads"], WIDTH["num_key_value_heads"]


def normed(hidden: torch.Tensor, norm: Any) -> torch.Tensor:
    """Root-mean-square norm, float32."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight.float()


def attended(layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Hidden states (rows, positions, H) after a layer's attention, float32."""
    rows, positions, _ = hidden.shape
    states, attention = normed(hidden, layer.input_layernorm), layer.self_attn

    def heads(linear: Any, count: int) -> torch.Tensor:
        return (states @ full(linear).T).view(rows, positions, count, -1).transpose(1, 2)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos.float() + torch.cat([-high, low], dim=-1) * sin.float()

    query, key = rotated(heads(attention.q_proj, HEADS)), rotated(heads(attention.k_proj, GROUPS))
    value = heads(attention.v_proj, GROUPS)
    mixed = [
        scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        for q, k, v in zip(query, key, value, strict=True)
    ]
    return hidden + torch.stack(mixed).transpose(1, 2).flatten(2) @ full(attention.o_proj).T


def routed(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Router logits (tokens, E) of hidden states after attention, float32."""
    return normed(hidden, layer.post_attention_layernorm) @ layer.mlp.gate.weight.float().T


def mixed(layer: Any, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Hidden states (tokens, H) after a layer's experts, float32."""
    states = normed(hidden, layer.post_attention_layernorm)
    weight, expert = logits.softmax(-1).topk(CHOICES)
    weight = weight / weight.sum(-1, keepdim=True)
    out = hidden.clone()
    for number, (gate, up, down) in enumerate(matrices(layer.mlp.experts)):
        token, k = torch.where(expert == number)
        inner = silu(states[token] @ gate.T) * (states[token] @ up.T)
        out[token] += (inner @ down.T) * weight[token, k, None]
    return out


class Recorded:
    """The inputs and choices of the routers in this project's forward pass, and the residual at the start of each
    layer."""

    def __init__(self, model: Any, ids: torch.Tensor, matmul: str = "bf16") -> None:
        self.begun: list[torch.Tensor] = []
        self.expert: list[torch.Tensor] = []
        self.weight: list[torch.Tensor] = []
        handles = [layer.mlp.gate.register_forward_hook(self._keep) for layer in model.layers]
        forward = MixtralForward(model, matmul)
        original = forward.products.normed

        def noted(residual: torch.Tensor, *rest: Any, routed: bool) -> Any:
            result = original(residual, *rest, routed=routed)
            if not routed:
                self.begun.append(residual.clone())
            return result

        forward.products.normed = noted  # type: ignore[method-assign]
        try:
            forward(ids)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, gate: Any, inputs: Any, output: Any) -> None:
        self.expert.append(output[2].sort(-1).values)
        self.weight.append(output[1])


def compared(expert: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    """How many tokens' sets of experts differ from the reference's, and the margins of those."""
    ordered = logits.sort(-1, descending=True)
    wanted = ordered.indices[:, :CHOICES].sort(-1).values
    margin = (ordered.values[:, CHOICES - 1] - ordered.values[:, CHOICES]).cpu()
    wrong = (expert != wanted).any(-1).cpu()
    return {
        "tokens": len(wrong),
        "differ": int(wrong.sum()),
        "largest_margin_of_those": float(margin[wrong].max()) if wrong.any() else 0.0,
        "median_margin_of_all": float(margin.median()),
    }


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        model = full_size_model(options.layers)
        generator = torch.Generator("cuda").manual_seed(2)
        shape = (options.rows, options.positions)
        ids = torch.randint(0, WIDTH["vocab_size"], shape, device="cuda", generator=generator)
        batch, again = Recorded(model, ids), Recorded(model, ids)
        alone = [Recorded(model, ids[row : row + 1]) for row in range(options.rows)]
        cos, sin = model.rotary_emb(batch.begun[0], torch.arange(options.positions, device="cuda")[None])
        same, apart, rows = [], [], []
        straight = model.embed_tokens(ids).float()
        for number, layer in enumerate(model.layers):
            begun = batch.begun[number].view(*shape, -1).float()
            logits = routed(layer, attended(layer, begun, cos[0], sin[0]).flatten(0, 1))
            same.append(compared(batch.expert[number], logits))
            middle = attended(layer, straight, cos[0], sin[0]).flatten(0, 1)
            accumulated = routed(layer, middle)
            apart.append(compared(batch.expert[number], accumulated))
            straight = mixed(layer, middle, accumulated).view(*shape, -1)
            one = torch.cat([single.expert[number] for single in alone])
            rows.append(float((one != batch.expert[number]).any(-1).float().mean()))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "triton")},
        "layers": options.layers,
        "rows_and_positions": shape,
        "layer_by_layer_on_the_same_hidden_states": same,
        "accumulated_over_layers": apart,
        "share_of_tokens_that_differ_alone_and_in_a_batch_accumulated": rows,
        "two_runs_equal_to_the_bit": all(
            torch.equal(one, other)
            for one, other in zip([*batch.expert, *batch.weight], [*again.expert, *again.weight], strict=True)
        ),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
