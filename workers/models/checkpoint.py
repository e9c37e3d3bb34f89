"""Where a model's files are, whether they are whole, and what names their content.

Promises: a folder that comes back has a readable ``config.json`` and, where weights were asked for, every
safetensors file complete to the byte; its revision changes when a gate changes. Only safetensors are read or
fetched: nothing in a checkpoint can run code.

Does not know what a model is: no torch, no transformers. `workers.models.loading` builds the model from the folder.
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

_WHOLE_BYTES = 1 << 20  # tensors up to this size enter the fingerprint whole; arbitrary
_SAMPLE_BYTES = 64 << 10  # of larger ones, that much from the start, the middle and the end; arbitrary


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model on this machine's disk, and the name of its content."""

    folder: Path
    """Holds ``config.json``, and the weights if they were asked for."""
    model: str
    """The hub id, or the folder's own name (not its path: that differs between machines)."""
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
    """Find a model: an existing folder, else a hub id (fetched, or from the hub's cache when offline).

    Parameters
    ----------
    model
        A folder with ``config.json`` and safetensors, or a hub id ``organization/name``.
    revision
        Branch, tag or commit of a hub model; a folder has none.
    weights
        Whether the weights of a hub model are needed too; without them a few small files are fetched.

    Raises
    ------
    ValueError
        If there is no such model, or its files are missing, cut short or of another format.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _from_hub(str(model), revision, weights=weights)
    if revision is not None:
        raise ValueError(f"revision {revision!r} was given with {folder}, a folder: only a hub model has revisions")
    read_config(folder)
    return Checkpoint(folder=folder, model=folder.resolve().name, revision=f"sha256:{fingerprint(folder)}")


def _from_hub(repository: str, revision: str | None, *, weights: bool) -> Checkpoint:
    """Fetch what is not cached yet; the snapshot's folder is named after its commit."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or repository.startswith("."):
        raise ValueError(f"{repository!r} is neither an existing folder nor a hub id like organization/name")
    from huggingface_hub import constants, snapshot_download

    name = revision or "main"
    wanted = [*_CONFIGURATION_FILES, "*.safetensors"] if weights else _CONFIGURATION_FILES
    try:
        snapshot = snapshot_download(
            repository, revision=revision, allow_patterns=wanted, ignore_patterns=_OTHER_FORMATS
        )
    except OSError as error:  # every failure of the hub's client, from "no network" to "gated", is one
        raise ValueError(
            f"the hub model {repository!r}, revision {name!r}, could be neither fetched nor found "
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
    """Return a checkpoint's ``config.json``; a ValueError says why a folder is no checkpoint."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json (there: {_listing(folder)})")
    try:
        config = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(config).__name__}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sorted; all of them exist."""
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
        raise ValueError(f"{folder / INDEX} names {odd[0]!r:.80}, and must name files that lie beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {INDEX} names: "
            f"{', '.join(missing[:5])}; fetch them again"
        )
    return [folder / name for name in names]


def tensor_names(folder: Path) -> list[str]:
    """Return the names of all tensors of a checkpoint, as its files hold them, sorted."""
    return sorted(_tensors(folder))


def fingerprint(folder: Path) -> str:
    """Name the content of a local checkpoint without reading all of it.

    The SHA-256 (hex) of ``config.json`` and, for every tensor in the order of names, its name, dtype, shape
    and bytes: whole up to 1 MiB, and of any size where a part of the name is ``gate`` or ``router``; of other
    larger ones the first, middle and last 64 KiB. So it is cheap on 93 GB (about 0.2 GB are read), equal
    however the tensors are spread over files, and a changed gate always shows; a change in the unsampled part
    of a large matrix does not.
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
    """Byte ranges of the file that stand for a tensor."""
    start, stop = tensor.start, tensor.stop
    if stop - start <= _WHOLE_BYTES or {"gate", "router"} & set(name.split(".")):
        return [(start, stop)]
    middle = (start + stop - _SAMPLE_BYTES) // 2
    return [(at, at + _SAMPLE_BYTES) for at in (start, middle, stop - _SAMPLE_BYTES)]


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of a checkpoint, from the files' headers; a ValueError names a file that is cut short."""
    found: dict[str, _Tensor] = {}
    for file in weight_files(folder):
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size_bytes < 8 + header_bytes:
                raise ValueError(
                    f"{file} is cut short or no safetensors file: its header should end at byte "
                    f"{8 + header_bytes}, and it has {size_bytes} bytes; fetch it again"
                )
            try:
                entries = parse_json(stream.read(header_bytes))
                entries.pop("__metadata__", None)
                base = 8 + header_bytes
                for name, entry in entries.items():
                    start, stop = (base + operator.index(offset) for offset in entry["data_offsets"])
                    if not base <= start <= stop:
                        raise ValueError(f"{name} ends before it begins")
                    found[name] = _Tensor(file, entry["dtype"], entry["shape"], start, stop)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is no safetensors file: its header is unreadable ({error!r})") from error
        end = max((tensor.stop for tensor in found.values() if tensor.file == file), default=base)
        if end != size_bytes:
            raise ValueError(
                f"{file} is cut short or overwritten: its header promises {end} bytes, it has {size_bytes}; "
                "fetch it again"
            )
    _refuse_gaps(folder, found)
    return found


def _refuse_gaps(folder: Path, tensors: dict[str, _Tensor]) -> None:
    """All experts of a layer have the same tensors; transformers' error does not say which one is missing."""
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
