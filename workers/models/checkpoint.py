"""Where a model's files are, whether they are complete, and how their content is identified.

Promises: a returned folder has a readable ``config.json`` and, if weights were requested, every safetensors file
complete to the byte; its revision changes when a gate changes. Only safetensors files are read or fetched, so nothing
in a checkpoint can run code.

Does not use torch or transformers; `workers.models.loading` builds the model from the folder.
"""

import hashlib
import json
import operator
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from store.records import parse_json

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# `consolidated*` repeats the weights under other names; sub-folders hold other formats of the same model.
_CONFIGURATION_FILES = ["*.json", "tokenizer*", "*.jinja"]
_OTHER_FORMATS = ["consolidated*", "*/*"]

_WHOLE_BYTES = 1 << 20  # tensors up to this size are hashed completely; arbitrary
_SAMPLE_BYTES = 64 << 10  # bytes hashed at the start, middle and end of larger tensors; arbitrary


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model on this machine's disk, and the identity of its content."""

    folder: Path
    """Holds ``config.json``, and the weights if they were requested."""
    model: str
    """The hub id, or the folder's own name (not its path, which differs between machines)."""
    revision: str
    """The hub commit, or ``sha256:`` and the `fingerprint` of a local folder."""


class _Tensor(NamedTuple):
    """Where one tensor's bytes are in a safetensors file."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    stop: int


def find_checkpoint(model: str | Path, revision: str | None = None, *, weights: bool) -> Checkpoint:
    """Find a model: an existing folder, or a hub id (fetched, or read from the hub's cache when offline).

    Parameters
    ----------
    model
        A folder with ``config.json`` and safetensors, or a hub id ``organization/name``.
    revision
        Branch, tag or commit of a hub model; not for a folder.
    weights
        Whether the weights of a hub model are needed too; otherwise only a few small files are fetched.

    Raises
    ------
    ValueError
        If there is no such model, or its files are missing, truncated or of another format.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _from_hub(str(model), revision, weights=weights)
    if revision is not None:
        raise ValueError(f"revision {revision!r} was given, but {folder} is a folder: only hub models have revisions")
    read_config(folder)
    return Checkpoint(folder=folder, model=folder.resolve().name, revision=f"sha256:{fingerprint(folder)}")


def _from_hub(repository: str, revision: str | None, *, weights: bool) -> Checkpoint:
    """Fetch the files that are not cached yet; the snapshot's folder is named after its commit."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or repository.startswith("."):
        raise ValueError(f"{repository!r} is neither an existing folder nor a hub id like organization/name")
    from huggingface_hub import constants, snapshot_download

    name = revision or "main"
    wanted = [*_CONFIGURATION_FILES, "*.safetensors"] if weights else _CONFIGURATION_FILES
    try:
        snapshot = snapshot_download(
            repository, revision=revision, allow_patterns=wanted, ignore_patterns=_OTHER_FORMATS
        )
    except OSError as error:  # every failure of the hub's client is an OSError, from "no network" to "gated"
        raise ValueError(
            f"the hub model {repository!r}, revision {name!r}, could not be fetched and is not "
            f"in the cache {constants.HF_HUB_CACHE} (files {', '.join(wanted)}): {error}. A gated or private "
            "model needs HF_TOKEN in the environment; without a network, give the path of a folder with "
            "config.json and the safetensors files"
        ) from error
    folder = Path(snapshot)
    read_config(folder)
    if weights:
        _tensors(folder)  # for its checks
    return Checkpoint(folder=folder, model=repository, revision=folder.name)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's ``config.json``; a ValueError says why a folder is not a checkpoint."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json (there: {_listing(folder)})")
    try:
        config = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(config).__name__}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sorted. All of them exist."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has neither {_SINGLE} nor {INDEX} (there: {_listing(folder)}); only safetensors weights are read"
        )
    try:
        names = sorted(set(parse_json((folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} has no readable weight_map: {error!r}") from error
    if odd := [name for name in names if not isinstance(name, str) or Path(name).name != name or "\0" in name]:
        raise ValueError(f"{folder / INDEX} names {odd[0]!r:.80}, but must name files in its own folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {INDEX} names: "
            f"{', '.join(missing[:5])}; fetch them again"
        )
    return [folder / name for name in names]


def tensor_names(folder: Path) -> list[str]:
    """Return the names of all tensors in a checkpoint's files, sorted."""
    return sorted(_tensors(folder))


def fingerprint(folder: Path) -> str:
    """Identify the content of a local checkpoint without reading all of it.

    The SHA-256 (hex) of ``config.json`` and, for every tensor in the order of names, its name, dtype, shape and bytes.
    Tensors of up to 1 MiB, and those of any size with ``gate`` or ``router`` as a part of the name, are hashed
    completely; of other larger tensors the first, middle and last 64 KiB are hashed. So the fingerprint is cheap for 93
    GB (about 0.2 GB are read) and does not depend on how the tensors are spread over files. A changed gate always
    changes it; a change in the unsampled part of a large matrix does not.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    tensors = _tensors(folder)
    with ExitStack() as stack:
        streams = {file: stack.enter_context(file.open("rb")) for file in weight_files(folder)}
        for name, tensor in sorted(tensors.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for start, stop in _sampled(name, tensor):
                streams[tensor.file].seek(start)
                digest.update(streams[tensor.file].read(stop - start))
    return digest.hexdigest()


def _sampled(name: str, tensor: _Tensor) -> list[tuple[int, int]]:
    """Byte ranges of the file that represent a tensor."""
    start, stop = tensor.start, tensor.stop
    if stop - start <= _WHOLE_BYTES or {"gate", "router"} & set(name.split(".")):
        return [(start, stop)]
    middle = (start + stop - _SAMPLE_BYTES) // 2
    return [(at, at + _SAMPLE_BYTES) for at in (start, middle, stop - _SAMPLE_BYTES)]


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of a checkpoint, from the files' headers; a ValueError names a truncated file."""
    found: dict[str, _Tensor] = {}
    for file in weight_files(folder):
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size_bytes < 8 + header_bytes:
                raise ValueError(
                    f"{file} is truncated or not a safetensors file: its header should end at byte "
                    f"{8 + header_bytes}, but it has {size_bytes} bytes; fetch it again"
                )
            try:
                entries = parse_json(stream.read(header_bytes))
                entries.pop("__metadata__", None)
                base = 8 + header_bytes
                for name, entry in entries.items():
                    start, stop = (base + operator.index(offset) for offset in entry["data_offsets"])
                    if not base <= start <= stop:
                        raise ValueError(f"{name} ends before it starts")
                    found[name] = _Tensor(file, entry["dtype"], entry["shape"], start, stop)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is not a safetensors file: its header is unreadable ({error!r})") from error
        end = max((tensor.stop for tensor in found.values() if tensor.file == file), default=base)
        if end != size_bytes:
            raise ValueError(
                f"{file} is truncated or overwritten: its header promises {end} bytes, but it has {size_bytes}; "
                "fetch it again"
            )
    _refuse_gaps(folder, found)
    return found


def _refuse_gaps(folder: Path, tensors: dict[str, _Tensor]) -> None:
    """Check that all experts of a layer have the same tensors; transformers' error does not say which one is
    missing."""
    leaves: dict[str, set[str]] = {}
    experts: dict[str, set[str]] = {}
    for name in tensors:
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(.+)", name):
            experts.setdefault(match[1], set()).add(match[2])
            leaves.setdefault(match[1], set()).add(match[3])
    expected = {f"{layer}.{expert}.{leaf}" for layer in experts for expert in experts[layer] for leaf in leaves[layer]}
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(expected)} expert tensors: {', '.join(missing[:5])}; "
            "fetch it again"
        )


def _listing(folder: Path) -> str:
    """A few names of a folder, for an error."""
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
