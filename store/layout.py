"""What the arrays of a capture look like on disk, and how one shard of one becomes bytes.

Dimensions: doc (a row: a window of a document), position, layer, k (0 is the largest weight), document (what the
data set holds), token_id. Zarr v3 with core codecs only, so that any Zarr reader opens it without this package.

Bytes are made by writing into an in-memory Zarr array of one shard through Zarr's public interface; they equal what
Zarr would have written into the large array, the clipped last shard included (a test holds this).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

SCHEMA_VERSION = 1
SHARD_TOKENS = 262_144  # positions in a shard: 12 s of an H200, 26-90 s of smaller GPUs (measured)
ROW_CHUNK = 65_536  # entries in a chunk of the one-dimensional arrays
CHUNK_ROWS, CHUNK_POSITIONS = (
    64,
    512,
)  # inner chunk; all layers in it: full scans ran 5 times faster (measured)
SHARD_CHOICES = 2**31  # in a shard at most: 4.3 GB of weights; S3 takes 5 GB in a put, and a worker holds two shards
CHUNK_CHOICES = 2**21  # choices in an inner chunk at most: 2 MB of experts, 4 MB of weights

MISSING_TOKEN = -1
MISSING_ROLE = 255


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array's type and grid; its first dimension grows while the data set is planned."""

    dtype: str
    dims: tuple[str, ...]
    trailing: tuple[int, ...] = ()
    """Sizes of all dimensions but the first."""
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None = None
    fill: int | float | str
    compressors: tuple[Any, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Entries of the first dimension in one object."""
        return (self.shard or self.chunk)[0]

    def key(self, index: int) -> str:
        """Key of the `index`-th object along the first dimension, relative to the array's folder."""
        return "/".join(["c", str(index), *("0" for _ in self.trailing)])

    def metadata(self, size: int) -> bytes:
        """The array's `zarr.json` when its first dimension has `size` entries."""
        objects, _ = self._in_memory(size)
        return objects["zarr.json"].to_bytes()

    def encode(self, values: np.ndarray) -> bytes:
        """The bytes of one shard (or chunk, where there are no shards) that holds `values` from its start.

        Parameters
        ----------
        values : array, shape (rows, \\*trailing)
            At most one shard of rows; fewer only in the last shard.
        """
        assert 0 < len(values) <= self.step, (len(values), self.shard, self.chunk)
        assert values.shape[1:] == self.trailing, (values.shape, self.trailing)
        objects, array = self._in_memory(len(values))
        array[...] = values
        return objects[self.key(0)].to_bytes()

    def decode(self, data: bytes, size: int) -> np.ndarray:
        """The first `size` entries that one object's bytes hold.

        Raises
        ------
        ValueError
            When the bytes are not such an object's, or a checksum in them does not hold.
        """
        objects, array = self._in_memory(size)
        objects[self.key(0)] = cpu.Buffer.from_bytes(data)
        try:
            return np.asarray(array[...])
        except Exception as error:  # codecs raise whatever they run into
            raise ValueError(str(error) or repr(error)) from error

    def _in_memory(self, size: int) -> tuple[dict[str, Buffer], zarr.Array[Any]]:
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
            # Inside a shard an inner chunk of fill is left out; a one-dimensional chunk is always written, so that
            # "no object" never means "all fill".
            config={"write_empty_chunks": self.shard is None},
        )
        return objects, array


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The grid of one data set's arrays.

    Raises
    ------
    ValueError
        When a size is not positive, or there are more experts than a uint16 can name.
    """

    sequence_length: int
    """P: positions in a row."""
    rows_per_shard: int
    """S: rows in a shard; rounded down to whole inner chunks, which sharding demands."""
    layers: tuple[int, ...]
    """The model's own numbers of the layers that have experts."""
    num_experts: int
    experts_per_token: int
    vocab_size: int
    roles: tuple[str, ...] = ()
    """Names of the speakers where the data set is made of conversations."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "rows_per_shard", "num_experts", "experts_per_token", "vocab_size"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}, and must be 1 or more, and an int32")
        if not self.layers:
            raise ValueError("the model has no layer with experts")
        if not all(type(layer) is int and 0 <= layer < 2**31 for layer in self.layers):
            raise ValueError(f"layers is {self.layers!r:.80}, and must hold numbers from 0 on")
        if not all(isinstance(role, str) for role in self.roles):
            raise ValueError(f"roles is {self.roles!r:.80}, and must hold names")
        if self.num_experts >= 65_535:
            raise ValueError(f"num_experts is {self.num_experts}; the store can name 65,534 at most")
        choices = self.rows_per_shard * self.sequence_length * len(self.layers) * self.experts_per_token
        if choices > SHARD_CHOICES:
            raise ValueError(
                f"a shard of {self.rows_per_shard} rows would hold {choices:,} choices, and {SHARD_CHOICES:,} are the"
                " most: give fewer --rows_per_shard"
            )
        rows = self.inner_chunk[0]
        object.__setattr__(self, "rows_per_shard", self.rows_per_shard // rows * rows)

    @property
    def missing_expert(self) -> int:
        """The expert id that means "not captured": no legal expert has it."""
        return 255 if self.num_experts <= 255 else 65_535

    @property
    def inner_chunk(self) -> tuple[int, int]:
        """Rows and positions of an inner chunk of `expert`, `weight` and `token`."""
        positions = min(CHUNK_POSITIONS, self.sequence_length)
        choices_a_row = positions * len(self.layers) * self.experts_per_token
        rows = max(1, min(CHUNK_ROWS, CHUNK_CHOICES // choices_a_row, self.rows_per_shard))
        return 2 ** int(math.log2(rows)), positions

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array of the group by name."""
        rows, positions = self.inner_chunk
        shard_positions = math.ceil(self.sequence_length / positions) * positions
        layers, k = len(self.layers), self.experts_per_token
        choice: dict[str, Any] = {
            "dims": ("doc", "position", "layer", "k"),
            "trailing": (self.sequence_length, layers, k),
            "chunk": (rows, positions, layers, k),
            "shard": (self.rows_per_shard, shard_positions, layers, k),
        }
        place: dict[str, Any] = {
            "dims": ("doc", "position"),
            "trailing": (self.sequence_length,),
            "chunk": (rows, positions),
            "shard": (self.rows_per_shard, shard_positions),
        }
        expert_dtype = "uint8" if self.num_experts <= 255 else "uint16"
        arrays = {
            "expert": ArraySpec(
                dtype=expert_dtype, fill=self.missing_expert, compressors=_blosc("lz4", 5, "bitshuffle"),
                attrs={"long_name": "expert chosen", "units": "1", "missing": self.missing_expert}, **choice,
            ),
            "weight": ArraySpec(
                dtype="float16", fill=0.0, compressors=_blosc("zstd", 5, "shuffle"),
                attrs={"long_name": "weight of the choice", "units": "1"}, **choice,
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
                dtype="int32", dims=("layer",), chunk=(layers,), fill=-1, compressors=(Crc32cCodec(),),
                attrs={"long_name": "layer, as the model numbers it", "units": "1"},
            ),
        }  # fmt: skip
        if self.roles:
            flags = {"flag_values": list(range(len(self.roles))), "flag_meanings": " ".join(self.roles)}
            arrays["role"] = ArraySpec(
                dtype="uint8", fill=MISSING_ROLE, compressors=_blosc("zstd", 3, "shuffle"),
                attrs={"long_name": "speaker of the token", "missing": MISSING_ROLE, **flags}, **place,
            )  # fmt: skip
        return arrays


def default_rows_per_shard(sequence_length: int) -> int:
    """S for a row of P positions: a shard of about `SHARD_TOKENS` positions, one row at least."""
    return max(1, SHARD_TOKENS // sequence_length)


def _is_count(value: object) -> bool:
    """Whether it is a whole number from 1 on that an int32 holds."""
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
    # Without the checksum a flipped bit reads as data.
    return (BloscCodec(cname=cname, clevel=clevel, shuffle=shuffle), Crc32cCodec())  # type: ignore[arg-type]
