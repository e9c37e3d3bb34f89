"""The steps between the matrix products of a forward pass, each in one pass over memory.

T tokens, K choices per token, S = T·K slots sorted by expert, H hidden, I inner, D a head's dimension. Each function
has a plain form, which is its definition and runs on a CPU, and a Triton kernel, which runs on a GPU; a test compares
the two. All compute in float32 and round once, to the dtype of their input.
"""

from typing import Any, NamedTuple

import torch

from workers.models.four_bits import FourBits
from workers.models.stored import BLOCK

try:  # CPU builds of torch do not include it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS_WIDTH = 1024  # elements of a row that one program of `swiglu` reads at a time (arbitrary)
PACKED_BYTES = 1024  # bytes that one program of `dequantize` reads (arbitrary)


def plain_dequantize(matrices: FourBits, out: torch.Tensor) -> None:
    """Dequantize matrices in 4 bits into `out`, one below the other, in the dtype of `out`.

    NF4: Dettmers et al. 2023, arXiv:2305.14314. A block may continue in the next row.
    """
    pairs = torch.stack([matrices.packed >> 4, matrices.packed & 15], dim=-1)
    values = matrices.code[pairs.int()].view(*matrices.scale.shape, BLOCK)
    out.copy_((values * matrices.block_scales()[..., None]).view_as(out))


def plain_swiglu(both_SI2: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of (S, 2·I), gate first (Shazeer 2020, arXiv:2002.05202); shape (S, I)."""
    gate, up = both_SI2.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(both_SI2.dtype)


class HeadNorm(NamedTuple):
    """Root-mean-square norms of queries and keys, before their rotation."""

    scale: torch.Tensor
    """Shape (queries + keys, D): the norms' weights for each head."""
    eps: float
    queries: int
    """Number of heads that are queries; the others are keys."""
    whole: bool
    """Whether all queries of a token, and all its keys, share a mean square, as in OLMoE; otherwise each head has its
    own."""


class Place(NamedTuple):
    """Which values of a token's row are rotated: the last D of each head."""

    first: int
    """Start of the first head."""
    head: int
    """Number of values of a head."""
    pairs: bool
    """Whether adjacent values are rotated together, as in DeepSeek-V2; otherwise one half with the other, as in
    Llama."""


def plain_rotate(
    qkv_TW: torch.Tensor,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    heads: int,
    norm: HeadNorm | None = None,
    place: Place | None = None,
) -> None:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), in place, for a number of heads of each token.

    Without a place, these are the first heads of each row, rotated completely and by halves. Token t is at position t
    modulo P.
    """
    positions, turned = cos_PD.shape
    first, head, pairs = place or Place(0, turned, pairs=False)
    part = qkv_TW[:, first : first + heads * head].view(-1, positions, heads, head)[..., head - turned :]
    given = part.float() if norm is None else _normed_heads(part, norm).float()
    low, high = (given[..., 0::2], given[..., 1::2]) if pairs else given.chunk(2, dim=-1)
    cos_low, cos_high, sin_low, sin_high = (
        half[:, None] for table in (cos_PD, sin_PD) for half in table.float().chunk(2, dim=-1)
    )
    found = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    part.copy_(torch.stack(found, dim=-1).flatten(-2) if pairs else torch.cat(found, dim=-1))


def _normed_heads(heads_BPND: torch.Tensor, norm: HeadNorm) -> torch.Tensor:
    square = heads_BPND.float().square()
    if norm.whole:
        parts = square.tensor_split([norm.queries], dim=2)
        mean = torch.cat([part.mean((2, 3), keepdim=True).expand(*part.shape[:3], 1) for part in parts], dim=2)
    else:
        mean = square.mean(-1, keepdim=True)
    return (heads_BPND.float() * torch.rsqrt(mean + norm.eps)).to(heads_BPND.dtype) * norm.scale


def plain_add_norm(
    residual_TH: torch.Tensor,
    scale_H: torch.Tensor,
    eps: float,
    added_SH: torch.Tensor | None = None,
    slot_TK: torch.Tensor | None = None,
    weight_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add to the residual, in place, and return its root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467).

    Parameters
    ----------
    added_SH
        The rows to add: row t to token t or, with slots, the rows `slot_TK[t]`, weighted by `weight_TK[t]`.
    """
    if added_SH is not None:
        added = added_SH.float() if slot_TK is None else mixed(added_SH, slot_TK, weight_TK)
        residual_TH.copy_(residual_TH.float() + added)
    hidden = residual_TH.float()
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    return (normed.to(scale_H.dtype) * scale_H).to(residual_TH.dtype)


def mixed(rows_SH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor | None) -> torch.Tensor:
    """The rows of each token's slots, weighted and summed in float32 in the order of its choices; shape (T, H)."""
    assert weight_TK is not None
    total = torch.zeros(len(slot_TK), rows_SH.shape[1], device=rows_SH.device)
    for k in range(slot_TK.shape[1]):
        total += rows_SH[slot_TK[:, k]].float() * weight_TK[:, k, None].float()
    return total


if triton is not None:

    @triton.jit
    def _dequantize(  # type: ignore[no-untyped-def]
        packed, scale, step, offset, code, scale_code, out, count, blocks, steps, BYTES: tl.constexpr
    ):
        matrix = tl.program_id(1).to(tl.int64)
        first = tl.program_id(0).to(tl.int64) * BYTES
        byte = first + tl.arange(0, BYTES)
        pair = tl.load(packed + matrix * count + byte, byte < count, 0).to(tl.int32)
        block = byte // 32  # 64 values share a scale, and 256 scales share a second scale
        which = tl.load(scale + matrix * blocks + block, byte < count, 0).to(tl.int32)
        size = tl.load(step + matrix * steps + block // 256, byte < count, 0.0)
        size = tl.load(scale_code + which) * size + tl.load(offset + matrix)
        high, low = tl.load(code + (pair >> 4)) * size, tl.load(code + (pair & 15)) * size
        value = 2 * first + tl.arange(0, 2 * BYTES)
        tl.store(out + matrix * 2 * count + value, tl.interleave(high, low).to(out.dtype.element_ty), value < 2 * count)

    @triton.jit
    def _swiglu(both, out, inner: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        kept = column < inner
        gate = tl.load(both + row * 2 * inner + column, kept, 0.0).to(tl.float32)
        up = tl.load(both + row * 2 * inner + inner + column, kept, 0.0).to(tl.float32)
        value = gate / (1 + tl.exp(-gate)) * up
        tl.store(out + row * inner + column, value.to(out.dtype.element_ty), kept)

    @triton.jit
    def _rotate(  # type: ignore[no-untyped-def]
        qkv, cos, sin, scale, positions, width, eps, first, head_width, HEADS: tl.constexpr, QUERIES: tl.constexpr,
        HALF: tl.constexpr, NORM: tl.constexpr, LANE: tl.constexpr, PARTNER: tl.constexpr, LANES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """NORM is 0 without norms, 1 if each head has its own, 2 if queries and keys have one each.

        Values are LANE apart, and PARTNER apart from the values with which they are rotated.
        """
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, BLOCK)[:, None]
        lane = tl.arange(0, LANES)[None, :]
        place = qkv + token * width + first + head * head_width + lane * LANE
        kept = (head < HEADS) & (lane < HALF)
        turn = (token % positions) * 2 * HALF + lane
        low, high = tl.load(place, kept, 0.0).to(tl.float32), tl.load(place + PARTNER, kept, 0.0).to(tl.float32)
        if NORM != 0:
            mean = tl.sum(low * low + high * high, axis=1)[:, None]
            if NORM == 1:
                mean = mean / (2 * HALF)
            else:
                query = tl.sum(tl.where(head < QUERIES, mean, 0.0)) / (QUERIES * 2 * HALF)
                key = tl.sum(tl.where(head < QUERIES, 0.0, mean)) / ((HEADS - QUERIES) * 2 * HALF)
                mean = tl.where(head < QUERIES, query, key)
            inverse = tl.rsqrt(mean + eps)
            weight = scale + head * 2 * HALF + lane
            low = (low * inverse).to(qkv.dtype.element_ty) * tl.load(weight, kept, 0.0)
            high = (high * inverse).to(qkv.dtype.element_ty) * tl.load(weight + HALF, kept, 0.0)
            low, high = low.to(tl.float32), high.to(tl.float32)
        cos_low = tl.load(cos + turn, lane < HALF, 0.0).to(tl.float32)
        cos_high = tl.load(cos + turn + HALF, lane < HALF, 0.0).to(tl.float32)
        sin_low = tl.load(sin + turn, lane < HALF, 0.0).to(tl.float32)
        sin_high = tl.load(sin + turn + HALF, lane < HALF, 0.0).to(tl.float32)
        tl.store(place, (low * cos_low - high * sin_low).to(qkv.dtype.element_ty), kept)
        tl.store(place + PARTNER, (high * cos_high + low * sin_high).to(qkv.dtype.element_ty), kept)

    @triton.jit
    def added_and_normed(  # type: ignore[no-untyped-def]
        residual, scale, added, slot, weight, eps, token, column, kept, hidden: tl.constexpr, K: tl.constexpr
    ):
        """A token's norm, in the residual's dtype. K is 0 if nothing is added, and -1 if the token's own row is added.

        A scale in float32 is multiplied before the norm is rounded.
        """
        value = tl.load(residual + token * hidden + column, kept, 0.0).to(tl.float32)
        if K == -1:
            value += tl.load(added + token * hidden + column, kept, 0.0).to(tl.float32)
        mixed = tl.zeros_like(value)
        for k in tl.static_range(K):
            row = tl.load(slot + token * K + k).to(tl.int64)
            share = tl.load(weight + token * K + k).to(tl.float32)
            mixed += tl.load(added + row * hidden + column, kept, 0.0).to(tl.float32) * share
        if K != 0:
            value = (value + mixed).to(residual.dtype.element_ty)
            tl.store(residual + token * hidden + column, value, kept)
            value = value.to(tl.float32)
        normed = value * tl.rsqrt(tl.sum(value * value) / hidden + eps)
        normed = normed.to(scale.dtype.element_ty) * tl.load(scale + column, kept, 0.0)
        return normed.to(residual.dtype.element_ty)

    @triton.jit
    def _add_norm(  # type: ignore[no-untyped-def]
        residual, scale, out, added, slot, weight, eps, hidden: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDTH)
        kept = column < hidden
        normed = added_and_normed(residual, scale, added, slot, weight, eps, token, column, kept, hidden, K)
        tl.store(out + token * hidden + column, normed, kept)


def dequantize(matrices: FourBits, out: torch.Tensor) -> None:
    """`plain_dequantize`."""
    if not _fused(out):
        return plain_dequantize(matrices, out)
    many, count = matrices.packed.shape
    sizes = count, matrices.scale.shape[1], matrices.step.shape[1]
    _launch(_dequantize, (-(-count // PACKED_BYTES), many), *matrices, out, *sizes, BYTES=PACKED_BYTES)
    return None


def swiglu(both_SI2: torch.Tensor) -> torch.Tensor:
    """`plain_swiglu`."""
    if not _fused(both_SI2):
        return plain_swiglu(both_SI2)
    rows, inner = both_SI2.shape[0], both_SI2.shape[1] // 2
    out = both_SI2.new_empty(rows, inner)
    _launch(_swiglu, (rows, -(-inner // ROWS_WIDTH)), both_SI2, out, inner=inner, WIDTH=ROWS_WIDTH)
    return out


def rotate(
    qkv_TW: torch.Tensor,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    heads: int,
    norm: HeadNorm | None = None,
    place: Place | None = None,
) -> None:
    """`plain_rotate`."""
    if not _fused(qkv_TW):
        return plain_rotate(qkv_TW, cos_PD, sin_PD, heads, norm, place)
    half = cos_PD.shape[1] // 2
    first, head, pairs = place or Place(0, 2 * half, pairs=False)
    scale, eps, queries, whole = norm or (cos_PD, 0.0, 0, False)
    tables = (cos_PD.contiguous(), sin_PD.contiguous(), scale, cos_PD.shape[0], qkv_TW.shape[1], eps)
    _launch(
        _rotate, (len(qkv_TW),), qkv_TW, *tables, first + head - 2 * half, head, HEADS=heads, QUERIES=queries,
        HALF=half, NORM=0 if norm is None else 1 + whole, LANE=1 + pairs, PARTNER=1 if pairs else half,
        LANES=triton.next_power_of_2(half), BLOCK=triton.next_power_of_2(heads),
    )  # fmt: skip
    return None


def add_norm(
    residual_TH: torch.Tensor,
    scale_H: torch.Tensor,
    eps: float,
    added_SH: torch.Tensor | None = None,
    slot_TK: torch.Tensor | None = None,
    weight_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """`plain_add_norm`."""
    if not _fused(residual_TH):
        return plain_add_norm(residual_TH, scale_H, eps, added_SH, slot_TK, weight_TK)
    hidden = residual_TH.shape[1]
    choices = 0 if added_SH is None else -1 if slot_TK is None else slot_TK.shape[1]
    out = torch.empty_like(residual_TH)
    parts = (residual_TH, scale_H, out, *(out if part is None else part for part in (added_SH, slot_TK, weight_TK)))
    width = triton.next_power_of_2(hidden)
    _launch(_add_norm, (len(residual_TH),), *parts, eps, hidden=hidden, K=choices, WIDTH=width, num_warps=8)
    return out


def _fused(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and triton is not None


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device(arguments[0].device):
        kernel[grid](*arguments, **constants)
