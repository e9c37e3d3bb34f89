"""The arrays of a capture on disk, and how one shard of an array becomes bytes.

Dimensions: doc (a row: a window of a document), position, layer, k (0 is the largest weight), document (an entry of the
data set), token_id. Zarr v3 with core codecs only, so that any Zarr reader opens it without this package.

Bytes are made by writing into an in-memory Zarr array of one shard through Zarr's public interface; they equal the
bytes that Zarr would have written into the large array, including the clipped last shard (tested).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

SCHEMA_VERSION = 1
WITHOUT_WEIGHTS = 2  # the schema version of a group without `weight`: code of the first version would look for it
SHARD_TOKENS = 262_144  # positions in a shard: 12 s of an H200, 26-90 s of smaller GPUs (measured)
ROW_CHUNK = 65_536  # entries in a chunk of the one-dimensional arrays
CHUNK_ROWS, CHUNK_POSITIONS = 64, 512  # inner chunk with all layers: full scans ran 5 times faster (measured)
SHARD_CHOICES = 2**31  # maximum per shard: 4.3 GB of weights; S3 accepts 5 GB in a put, and a worker holds two shards
SHARD_BYTES = 2**32  # maximum per shard of an array with more than a weight for each choice
CHUNK_CHOICES = 2**21  # maximum choices or logits per inner chunk: 2 MB of experts, 4 MB of weights, 8 MB of logits

FLOAT16_BITS, FLOAT32_BITS = 10, 23  # bits of a mantissa, without the implicit leading one

MISSING_TOKEN = -1
MISSING_ROLE = 255  # also the missing phase


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array's type and grid."""

    dtype: str
    dims: tuple[str, ...]
    trailing: tuple[int, ...] = ()
    """Sizes of all dimensions but the first."""
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None = None
    fill: int | float | str
    compressors: tuple[Any, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    captured: bool = False
    """Whether workers fill it, one shard at a time; all other arrays belong to the plan."""

    @property
    def grows(self) -> bool:
        """Whether its first dimension grows while the data set is planned."""
        return self.dims[0] in ("doc", "document")

    @property
    def step(self) -> int:
        """Number of entries of the first dimension in one object."""
        return (self.shard or self.chunk)[0]

    @property
    def shard_bytes(self) -> int:
        """Bytes of a full shard before compression."""
        return math.prod(self.shard or self.chunk) * np.dtype(self.dtype).itemsize

    def key(self, index: int) -> str:
        """Key of the `index`-th object along the first dimension, relative to the array's folder."""
        return "/".join(["c", str(index), *("0" for _ in self.trailing)])

    def metadata(self, size: int) -> bytes:
        """The array's `zarr.json` when its first dimension has `size` entries."""
        objects, _ = self._in_memory(size)
        return objects["zarr.json"].to_bytes()

    def encode(self, values: np.ndarray) -> bytes:
        """The bytes of one shard (or chunk, if there are no shards) that begins with `values`.

        Parameters
        ----------
        values : array, shape (rows, \\*trailing)
            At most one shard of rows; fewer only for the last shard.
        """
        assert 0 < len(values) <= self.step, (len(values), self.shard, self.chunk)
        assert values.shape[1:] == self.trailing, (values.shape, self.trailing)
        objects, array = self._in_memory(len(values), empty_chunks=self._is_begun(values))
        array[...] = values
        if self.key(0) not in objects:  # all fill: Zarr omits a shard if all its inner chunks are omitted
            objects, array = self._in_memory(len(values), empty_chunks=True)
            array[...] = values
        return objects[self.key(0)].to_bytes()

    def decode(self, data: bytes, size: int) -> np.ndarray:
        """The first `size` entries of one object, from its bytes.

        Raises
        ------
        ValueError
            When the bytes are not those of such an object, or a checksum in them does not match.
        """
        objects, array = self._in_memory(size)
        objects[self.key(0)] = cpu.Buffer.from_bytes(data)
        try:
            return np.asarray(array[...])
        except Exception as error:  # codecs raise errors of many kinds
            raise ValueError(str(error) or repr(error)) from error

    def _is_begun(self, values: np.ndarray) -> bool:
        """Whether every inner chunk has a row that does not start with fill; Zarr then need not compare every value."""
        if self.shard is None:
            return True
        first = values[(slice(None), *(slice(None, None, size) for size in self.chunk[1:]))]
        begun = first != self.fill if self.fill == self.fill else first == first  # NaN is not equal to itself
        return bool(np.logical_or.reduceat(begun, range(0, len(values), self.chunk[0])).all())

    def _in_memory(self, size: int, *, empty_chunks: bool = False) -> tuple[dict[str, Buffer], zarr.Array[Any]]:
        objects: dict[str, Buffer] = {}
        array = zarr.create_array(
            MemoryStore(objects),
            shape=(size, *self.trailing),
            chunks=self.chunk,
            shards=self.shard,
            dtype=self.dtype,
            fill_value=self.fill,
            compressors=self.compressors,
            dimension_names=self.dims,
            attributes=dict(self.attrs),
            # Inside a shard, an inner chunk of fill is omitted. A one-dimensional chunk is always written, so "no
            # object" never means "all fill".
            config={"write_empty_chunks": empty_chunks},
        )
        return objects, array


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The grid of one data set's arrays.

    Raises
    ------
    ValueError
        When a size is not positive, there are more experts than a uint16 can name, or `record` names an array that is
        not in `OPTIONAL`.
    """

    sequence_length: int
    """P: positions in a row."""
    rows_per_shard: int
    """S: rows in a shard, rounded down to whole inner chunks as sharding requires."""
    layers: tuple[int, ...]
    """The model's own numbers of the layers that have experts."""
    num_experts: int
    experts_per_token: int
    vocab_size: int
    roles: tuple[str, ...] = ()
    """Names of the speakers, if the data set consists of conversations."""
    phases: tuple[str, ...] = ()
    """Names of the phases, prompt and generated, if imported routes have them."""
    record: tuple[str, ...] = ()
    """Names of the arrays of `OPTIONAL` that the capture has. They are also part of the capture's identity."""
    top_logits: int = 0
    """Number of largest logits of a token at a layer in `logit`, with their experts; 0: the logits of all experts."""
    weights: bool = True
    """Whether there is `weight`; False if imported routes have no weights."""
    weight_bits: int = FLOAT16_BITS
    """Bits of a weight's mantissa: 10 for float16, 23 for float32, fewer if weights are rounded to the precision of
    their router and kept in float16."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "rows_per_shard", "num_experts", "experts_per_token", "vocab_size"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}, but must be at least 1 and fit an int32")
        if not self.layers:
            raise ValueError("the model has no layer with experts")
        if not all(type(layer) is int and 0 <= layer < 2**31 for layer in self.layers):
            raise ValueError(f"layers is {self.layers!r:.80}, but must hold numbers from 0 on")
        for name in ("roles", "phases"):
            if not all(isinstance(label, str) for label in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}, but must hold names")
        if type(self.weights) is not bool:
            raise ValueError(f"weights is {self.weights!r:.80}, but must be true or false")
        if unknown := [name for name in self.record if name not in OPTIONAL]:
            known = ", ".join(OPTIONAL) or "none"
            raise ValueError(f"record names {unknown[0]!r:.80}, which this version cannot record; known are {known}")
        if self.num_experts >= 65_535:
            raise ValueError(f"num_experts is {self.num_experts}, but the store supports at most 65,534")
        if type(self.top_logits) is not int or not 0 <= self.top_logits <= self.num_experts:
            raise ValueError(f"top_logits is {self.top_logits!r:.80}, but must be 0 to {self.num_experts}, the experts")
        with_ids = {"logit", "logit_expert"} if self.top_logits else set()
        if {"logit", "logit_expert"} & {*self.record} not in (with_ids, {"logit"} - with_ids):
            raise ValueError(
                f"record is {self.record!r:.80} and top_logits {self.top_logits}: logit_expert must be recorded"
                " with logit if top_logits is 1 or more, and only then"
            )
        if type(self.weight_bits) is not int or self.weight_bits not in (FLOAT32_BITS, *range(1, FLOAT16_BITS + 1)):
            raise ValueError(f"weight_bits is {self.weight_bits!r:.80}, but must be 23, or 1 to 10")
        choices = self.rows_per_shard * self.sequence_length * len(self.layers) * self.experts_per_token
        if choices > SHARD_CHOICES:
            raise ValueError(
                f"a shard of {self.rows_per_shard} rows would hold {choices:,} choices, but the maximum is"
                f" {SHARD_CHOICES:,}: give fewer --rows_per_shard"
            )
        arrays, wide = self.arrays(), ["weight"] if self.weight_bits > FLOAT16_BITS else []
        for name in (*self.record, *wide):
            if (size := arrays[name].shard_bytes) > SHARD_BYTES:
                raise ValueError(
                    f"a shard of {self.rows_per_shard} rows would hold {size:,} bytes of {name}, but the maximum is"
                    f" {SHARD_BYTES:,}: give fewer --rows_per_shard"
                )
        rows = self.inner_chunk[0]
        object.__setattr__(self, "rows_per_shard", self.rows_per_shard // rows * rows)

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> "Layout":
        """The layout that a group's attributes describe: the inverse of `attrs`.

        Raises
        ------
        KeyError, TypeError, ValueError
            When they do not describe a layout.
        """
        fields = {name: value for name, value in attrs.items() if name in cls.__dataclass_fields__}
        lists = {"layers": fields["layers"], "roles": fields["roles"]}
        lists |= {name: fields.get(name, ()) for name in ("phases", "record")}
        return cls(**{**fields, **{name: tuple(values) for name, values in lists.items()}})

    def attrs(self) -> dict[str, Any]:
        """The group's attributes that describe this layout. Attributes that older stores lack are omitted if they have
        their default: an empty `record` or `phases`, `top_logits`, `weights`, and the `weight_bits` of float16."""
        said = {"record": bool(self.record), "phases": bool(self.phases), "weights": not self.weights}
        said |= {"top_logits": self.top_logits > 0, "weight_bits": self.weight_bits != FLOAT16_BITS}
        return {name: value for name, value in asdict(self).items() if said.get(name, True)}

    @property
    def schema_version(self) -> int:
        """The oldest schema version that has all these arrays."""
        return SCHEMA_VERSION if self.weights else WITHOUT_WEIGHTS

    @property
    def missing_expert(self) -> int:
        """The expert id that means "not captured", which is never a legal expert."""
        return missing_expert(self.num_experts)

    @property
    def expert_dtype(self) -> str:
        """The dtype of arrays of expert ids."""
        return "uint8" if self.num_experts <= 255 else "uint16"

    @property
    def inner_chunk(self) -> tuple[int, int]:
        """Rows and positions of an inner chunk of `expert`, `weight` and `token`."""
        positions = min(CHUNK_POSITIONS, self.sequence_length)
        choices_a_row = positions * len(self.layers) * self.experts_per_token
        return _power_of_two(min(CHUNK_ROWS, CHUNK_CHOICES // choices_a_row, self.rows_per_shard)), positions

    @cached_property
    def routes(self) -> tuple[str, ...]:
        """Names of the arrays that workers fill, a shard's routes, in the order of `arrays`."""
        return tuple(name for name, spec in self.arrays().items() if spec.captured)

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The labels of tokens in the plan, by array: speakers in `role`, prompt and generated in `phase`."""
        given = {"role": self.roles, "phase": self.phases}
        return {name: labels for name, labels in given.items() if labels}

    def grid(self, *more: str) -> dict[str, Any]:
        """Dimensions, chunks and shards of an array with a value for each position.

        Parameters
        ----------
        more
            Dimensions after doc and position; any of "layer", "k", "expert_id" and "candidate".

        Returns
        -------
        dict
            `dims`, `trailing`, `chunk` and `shard` of an `ArraySpec`.
        """
        rows, positions = self.inner_chunk
        shard_positions = math.ceil(self.sequence_length / positions) * positions
        lengths = {"layer": len(self.layers), "k": self.experts_per_token}
        lengths |= {"expert_id": self.num_experts, "candidate": self.top_logits}
        last = tuple(lengths[dim] for dim in more)
        rows = min(rows, _power_of_two(CHUNK_CHOICES // (positions * math.prod(last))))
        return {
            "dims": ("doc", "position", *more),
            "trailing": (self.sequence_length, *last),
            "chunk": (rows, positions, *last),
            "shard": (self.rows_per_shard, shard_positions, *last),
        }

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array of the group by name."""
        choice, place = self.grid("layer", "k"), self.grid()
        rounded = {"mantissa_bits": self.weight_bits} if self.weight_bits < FLOAT16_BITS else {}
        arrays = {
            "expert": ArraySpec(
                dtype=self.expert_dtype, fill=self.missing_expert, compressors=_blosc("lz4", 5, "bitshuffle"),
                attrs={"long_name": "expert chosen", "units": "1", "missing": self.missing_expert},
                captured=True, **choice,
            ),
            "weight": ArraySpec(
                dtype="float32" if self.weight_bits > FLOAT16_BITS else "float16", fill=0.0,
                compressors=_blosc("zstd", 5, "shuffle"),
                attrs={"long_name": "weight of the choice", "units": "1", **rounded}, captured=True, **choice,
            ),
            "token": ArraySpec(
                dtype="int32", fill=MISSING_TOKEN, compressors=_blosc("zstd", 3, "shuffle"),
                attrs={"long_name": "token id", "units": "1", "missing": MISSING_TOKEN}, **place,
            ),
            "length": _row("int32", {"long_name": "tokens in the row", "units": "token"}),
            "document_id": _row("int64", {"long_name": "document that the row is a window of", "units": "1"}),
            "offset": _row("int32", {"long_name": "document tokens before the row", "units": "token"}),
            "name": _text("document", "title, path or id of the document"),
            "piece": _text("token_id", "the tokenizer's piece"),
            "layer": ArraySpec(
                dtype="int32", dims=("layer",), chunk=(len(self.layers),), fill=-1, compressors=(Crc32cCodec(),),
                attrs={"long_name": "layer, as the model numbers it", "units": "1"},
            ),
        }  # fmt: skip
        if not self.weights:
            del arrays["weight"]
        for name, labels in self.labels.items():
            flags = {"flag_values": list(range(len(labels))), "flag_meanings": " ".join(labels)}
            arrays[name] = ArraySpec(
                dtype="uint8", fill=MISSING_ROLE, compressors=_blosc("zstd", 3, "shuffle"),
                attrs={"long_name": LABELS[name], "missing": MISSING_ROLE, **flags}, **place,
            )  # fmt: skip
        return arrays | {name: spec(self) for name, spec in OPTIONAL.items() if name in self.record}


LABELS = {"role": "speaker of the token", "phase": "whether the token was given or generated"}
PHASES = ("prompt", "generated")
"""The labels of `phase`."""


def _logit(layout: Layout) -> ArraySpec:
    return ArraySpec(
        dtype="float32", fill=math.nan, compressors=_blosc("zstd", 5, "shuffle"), captured=True,
        attrs={"long_name": "router logit", "units": "1"},
        **layout.grid("layer", "candidate" if layout.top_logits else "expert_id"),
    )  # fmt: skip


def _logit_expert(layout: Layout) -> ArraySpec:
    return ArraySpec(
        dtype=layout.expert_dtype, fill=layout.missing_expert, compressors=_blosc("lz4", 5, "bitshuffle"),
        attrs={"long_name": "expert of the router logit", "units": "1", "missing": layout.missing_expert},
        captured=True, **layout.grid("layer", "candidate"),
    )  # fmt: skip


def _output_norm(layout: Layout) -> ArraySpec:
    return ArraySpec(
        dtype="float32", fill=math.nan, compressors=_blosc("zstd", 5, "shuffle"), captured=True,
        attrs={"long_name": "L2 norm of the chosen expert's output before it is weighed", "units": "1"},
        **layout.grid("layer", "k"),
    )  # fmt: skip


def _logprob(layout: Layout) -> ArraySpec:
    return ArraySpec(
        dtype="float32", fill=math.nan, compressors=_blosc("zstd", 5, "shuffle"), captured=True,
        attrs={"long_name": "log-probability of the next token", "units": "nat"}, **layout.grid(),
    )  # fmt: skip


def _effect(layout: Layout) -> ArraySpec:
    return ArraySpec(
        dtype="float32", fill=math.nan, compressors=_blosc("zstd", 5, "shuffle"), captured=True,
        attrs={"long_name": "log-probability of the next token without the expert, less that with it", "units": "nat"},
        **layout.grid("layer", "expert_id"),
    )  # fmt: skip


OPTIONAL: dict[str, Callable[[Layout], ArraySpec]] = {
    "logit": _logit,
    "logit_expert": _logit_expert,
    "output_norm": _output_norm,
    "logprob": _logprob,
    "effect": _effect,
}
"""Arrays that a capture has if `Layout.record` names them.

An entry makes the array's spec from the layout, with `captured=True`, on a grid of `Layout.grid`. The array stores what
an engine returns under the same name, with the fill value at and beyond each row's length.

logit
    What the router computed before it chose: (doc, position, layer, expert_id) for every expert, or with `top_logits`
    (doc, position, layer, candidate) for the largest, in descending order, with their experts in `logit_expert`. The
    group's attribute `router_transformation` says how weights are computed from them: "softmax" over all experts,
    "renormalized" (softmax over the chosen ones), "sigmoid", or "unknown".
output_norm
    One value for each choice, in the order of `expert`.
logprob
    At the position that predicts; NaN at the last position of a row. The attribute `pairs_cut` of the plan counts the
    predictions that are lost because a document was cut into rows.
effect
    (doc, position, layer, expert_id), at the positions of `logprob`: the change in the log-probability of the next
    token when the expert cannot be chosen at the layer, negative for a loss. NaN for layers that were not measured.
"""


def missing_expert(num_experts: int) -> int:
    """The expert id that means "not captured", for a number of experts."""
    return 255 if num_experts <= 255 else 65_535


def default_rows_per_shard(sequence_length: int, shard_tokens: int = SHARD_TOKENS) -> int:
    """S for rows of P positions: a shard of about the given number of positions, at least one row."""
    return max(1, shard_tokens // sequence_length)


def _power_of_two(most: int) -> int:
    """The largest power of two that is not larger, at least 1."""
    return 1 << max(0, most.bit_length() - 1)


def _is_count(value: object) -> bool:
    """Whether a value is a positive integer that fits an int32."""
    return type(value) is int and 1 <= value < 2**31


def _row(dtype: str, attrs: Mapping[str, Any]) -> ArraySpec:
    return ArraySpec(
        dtype=dtype,
        dims=("doc",),
        chunk=(ROW_CHUNK,),
        fill=-1,
        compressors=_blosc("zstd", 3, "shuffle"),
        attrs=attrs,
    )


def _text(dim: str, long_name: str) -> ArraySpec:
    return ArraySpec(
        dtype="string", dims=(dim,), chunk=(ROW_CHUNK,), fill="", compressors=_blosc("zstd", 3, "noshuffle"),
        attrs={"long_name": long_name},
    )  # fmt: skip


def _blosc(cname: str, clevel: int, shuffle: str) -> tuple[Any, ...]:
    # Without the checksum, a flipped bit would be read as data.
    return (BloscCodec(cname=cname, clevel=clevel, shuffle=shuffle), Crc32cCodec())  # type: ignore[arg-type]
