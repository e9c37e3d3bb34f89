"""A bucket in memory: objects as in S3, without folders, never partial, with atomic conditional puts."""

from collections.abc import Sequence

from zarr.abc.store import Store
from zarr.buffer import cpu
from zarr.storage import MemoryStore


class Bucket:
    """See `store.objects.Objects`, also for its methods.

    Parameters
    ----------
    scratch : str
        Not used.
    files : dict
        The content of the bucket.
    """

    root = "s3://bucket/simulated.zarr"

    def __init__(self, scratch: str, files: dict[str, bytes]) -> None:
        self.scratch, self.files = scratch, files

    def get(self, key: str) -> bytes | None:
        return self.files.get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        return {key: self.files[key] for key in keys if key in self.files}

    def size_bytes(self, key: str) -> int | None:
        return len(self.files[key]) if key in self.files else None

    def sizes(self, prefix: str, keys: Sequence[str]) -> Sequence[int | None]:
        return [self.size_bytes(key) for key in keys]

    def put(self, key: str, data: bytes) -> None:
        self.files[key] = data

    def put_new(self, key: str, data: bytes) -> bool:
        return key not in self.files and self.files.update({key: data}) is None

    def put_over(self, key: str, old: bytes, data: bytes) -> bool:
        return self.files.get(key) == old and self.files.update({key: data}) is None

    def delete(self, key: str) -> None:
        self.files.pop(key, None)

    def list(self, prefix: str) -> list[str]:
        return sorted(name for name in self._below(prefix) if "/" not in name)

    def folders(self, prefix: str) -> Sequence[str]:
        return sorted({name.partition("/")[0] for name in self._below(prefix) if "/" in name})

    def clear(self, prefix: str) -> None:
        for name in self._below(prefix):
            del self.files[f"{prefix}/{name}"]

    def settle(self, prefix: str) -> None:
        pass

    def zarr_store(self) -> Store:
        return MemoryStore({key: cpu.Buffer.from_bytes(data) for key, data in self.files.items()}, read_only=True)

    def _below(self, prefix: str) -> Sequence[str]:
        start = f"{prefix}/" if prefix else ""
        return [key.removeprefix(start) for key in self.files if key.startswith(start)]
