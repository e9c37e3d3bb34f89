"""Whole objects by key in an S3 bucket, or in another storage that speaks its protocol.

A put is one request, durable when it returns; what must not be there yet is put with If-None-Match, what must not have
changed with If-Match. A failure that may pass is tried again for three quarters of a minute, then said in one sentence.

Address and credentials come from the standard variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...), else
from the machine's role. Not known here: versions of objects, encryption, storage classes; the bucket's defaults hold.

The client is obstore: it takes an eighth of s3fs's CPU time for a small object, and half for a shard (measured,
tests/benchmarks/s3.py).
"""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store
from zarr.abc.store import Store
from zarr.storage import ObjectStore

from store.secrets import without_secrets

CONNECT_S, REQUEST_S = 5, 60  # arbitrary; a shard of 20 MB in a minute is 0.3 MB/s
RETRIES, RETRY_S = 8, 45
AT_ONCE = 32  # arbitrary: requests for small objects in flight
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class S3Objects:
    """Objects in a bucket, under a prefix; the methods are those of `store.objects.Objects`.

    Parameters
    ----------
    place : str
        "bucket/prefix".
    scratch : str
        Nothing is ever written there: puts are whole.

    Raises
    ------
    ValueError
        When no bucket can have that name.
    """

    def __init__(self, place: str, scratch: str) -> None:
        self.bucket, _, prefix = place.rstrip("/").partition("/")
        if not _BUCKET.fullmatch(self.bucket):
            raise ValueError(
                f"s3://{place} names no store: a bucket has 3 to 63 of a-z, 0-9, '.' and '-', as in"
                " s3://my-bucket/routes.zarr"
            )
        self.root = f"s3://{self.bucket}/{prefix}".rstrip("/")
        self.scratch = scratch
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        self._store = S3Store(
            self.bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "timeout": timedelta(seconds=REQUEST_S),
            },
            retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
        )

    def get(self, key: str) -> bytes | None:
        with self._told():
            try:
                return obstore.get(self._store, key).bytes().to_bytes()
            except FileNotFoundError as error:
                _refuse_no_bucket(error)
                return None

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = zip(keys, pool.map(self.get, keys), strict=True)
            return {key: data for key, data in found if data is not None}

    def size_bytes(self, key: str) -> int | None:
        with self._told():
            try:
                return obstore.head(self._store, key)["size"]
            except FileNotFoundError as error:
                _refuse_no_bucket(error)
                return None

    def sizes(self, prefix: str, keys: Sequence[str]) -> Sequence[int | None]:
        """One request for a thousand objects."""
        found = self._all(prefix)
        return [found.get(key) for key in keys]

    def put(self, key: str, data: bytes) -> None:
        with self._told():
            obstore.put(self._store, key, data, use_multipart=False)

    def put_new(self, key: str, data: bytes) -> bool:
        with self._told():
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def put_over(self, key: str, old: bytes, data: bytes) -> bool:
        with self._told():
            try:
                standing = obstore.get(self._store, key)
                if standing.bytes().to_bytes() != old:
                    return False
                obstore.put(self._store, key, data, mode={"e_tag": standing.meta["e_tag"]}, use_multipart=False)
            except (FileNotFoundError, PreconditionError):
                return False
        return True

    def delete(self, key: str) -> None:
        with self._told():
            obstore.delete(self._store, key)

    def list(self, prefix: str) -> list[str]:
        with self._told():
            return sorted(_name(entry["path"]) for entry in obstore.list_with_delimiter(self._store, prefix)["objects"])

    def folders(self, prefix: str) -> Sequence[str]:
        with self._told():
            return sorted(_name(path) for path in obstore.list_with_delimiter(self._store, prefix)["common_prefixes"])

    def clear(self, prefix: str) -> None:
        if keys := sorted(self._all(prefix)):
            with self._told():
                obstore.delete(self._store, keys)

    def settle(self, prefix: str) -> None:
        """A put was durable before anybody saw it."""

    def zarr_store(self) -> Store:
        return ObjectStore(self._store, read_only=True)

    def _all(self, prefix: str) -> dict[str, int]:
        with self._told():
            pages = obstore.list(self._store, prefix, chunk_size=1000)
            return {entry["path"]: entry["size"] for page in pages for entry in page}

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A failure, in one sentence that names the store and what to do."""
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> OSError:
        told, where = map(without_secrets, (str(error), os.environ.get("AWS_ENDPOINT_URL") or "AWS"))
        code, message = (re.search(rf"<{tag}>([^<]*)</{tag}>", told) for tag in ("Code", "Message"))
        reason = f"{code[1]}: {message[1]}" if code and message else told.partition("\n")[0]
        if "NoSuchBucket" in told:
            return FileNotFoundError(
                f"{self.root}: {where} has no bucket {self.bucket!r}: make it, or name another store"
            )
        if "/latest/api/token" in told or "/latest/meta-data" in told:
            return PermissionError(
                f"{self.root}: there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the"
                " machine a role"
            )
        if re.search(r"status code: 40[13]", told):
            return PermissionError(
                f"{self.root}: {where} refuses these credentials ({reason}): they must be valid, and may list, get, put"
                " and delete in the bucket"
            )
        if "without LOCATION" in told:
            return OSError(f"{self.root}: the bucket is in another region: set AWS_REGION")
        if "HTTP error" in told:
            return ConnectionError(
                f"{self.root}: {where} cannot be reached ({reason}): check the network, AWS_ENDPOINT_URL and AWS_REGION"
            )
        return OSError(f"{self.root}: {reason}")


def _refuse_no_bucket(error: FileNotFoundError) -> None:
    """Raise the error again where it is not the object that is not there, but the bucket."""
    if "NoSuchBucket" in str(error):
        raise error


def _name(path: str) -> str:
    return path.rpartition("/")[2]
