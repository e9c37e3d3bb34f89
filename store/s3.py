"""Whole objects by key in an S3 bucket, or in another storage with the same protocol.

A put is one request, durable when it returns; an object that must not exist yet is put with If-None-Match, one that
must not have changed with If-Match. A temporary failure is retried for 45 seconds, and a request that takes more than a
minute is tried three times; then the failure is reported in one sentence.

Address and credentials come from the standard variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...),
otherwise from the machine's role. Versions of objects, encryption and storage classes are not handled here; the
bucket's defaults apply.

The client is obstore. It takes an eighth of the CPU time of s3fs for a small object, and half for a shard (measured,
tests/benchmarks/s3.py).
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store
from zarr.abc.store import Store
from zarr.storage import ObjectStore

from store.secrets import without_secrets

CONNECT_S, REQUEST_S = 5, 60  # arbitrary; a shard of 20 MB in a minute is 0.3 MB/s
RETRIES, RETRY_S = 100, 45  # as many as fit into the time
BACK_OFF_S, LONGEST_BACK_OFF_S, BACK_OFF_BASE = 0.1, 5, 3  # a pause is random, up to so many times the previous one
PAUSES_S = (1.0, 4.0)  # arbitrary: pauses before retries that the client does not make itself
AT_ONCE = 32  # arbitrary: concurrent requests for small objects
T = TypeVar("T")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class S3Objects:
    """Objects in a bucket, under a prefix; the methods are those of `store.objects.Objects`.

    Parameters
    ----------
    place : str
        "bucket/prefix".
    scratch : str
        Not used: every put is atomic.

    Raises
    ------
    ValueError
        When the bucket's name is not valid, or there is no prefix.
    """

    def __init__(self, place: str, scratch: str) -> None:
        self.bucket, _, prefix = place.rstrip("/").partition("/")
        if not _BUCKET.fullmatch(self.bucket):
            raise ValueError(
                f"s3://{place} is not a store: a bucket's name has 3 to 63 of a-z, 0-9, '.' and '-', as in"
                " s3://my-bucket/routes.zarr"
            )
        if not prefix.strip("/"):
            raise ValueError(
                f"s3://{self.bucket} is a bucket's root, but what is kept next to a store needs a place in the bucket:"
                f" use s3://{self.bucket}/prefix, such as s3://{self.bucket}/routes.zarr"
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
            retry_config={
                "max_retries": RETRIES,
                "retry_timeout": timedelta(seconds=RETRY_S),
                "backoff": {
                    "init_backoff": timedelta(seconds=BACK_OFF_S),
                    "max_backoff": timedelta(seconds=LONGEST_BACK_OFF_S),
                    "base": BACK_OFF_BASE,
                },
            },
        )

    def get(self, key: str) -> bytes | None:
        return self._found(lambda: obstore.get(self._store, key).bytes().to_bytes())

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = zip(keys, pool.map(self.get, keys), strict=True)
            return {key: data for key, data in found if data is not None}

    def size_bytes(self, key: str) -> int | None:
        return self._found(lambda: obstore.head(self._store, key)["size"])

    def sizes(self, prefix: str, keys: Sequence[str]) -> Sequence[int | None]:
        """One request for a thousand objects."""
        found = self._all(prefix)
        return [found.get(key) for key in keys]

    def put(self, key: str, data: bytes) -> None:
        self._answer(lambda: obstore.put(self._store, key, data, use_multipart=False))

    def put_new(self, key: str, data: bytes) -> bool:
        def put() -> bool:
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

        return self._answer(put)

    def put_over(self, key: str, old: bytes, data: bytes) -> bool:
        def put() -> bool:
            try:
                standing = obstore.get(self._store, key)
                if standing.bytes().to_bytes() != old:
                    return False
                obstore.put(self._store, key, data, mode={"e_tag": standing.meta["e_tag"]}, use_multipart=False)
            except (FileNotFoundError, PreconditionError):
                return False
            return True

        return self._answer(put)

    def delete(self, key: str) -> None:
        self._answer(lambda: obstore.delete(self._store, key))

    def list(self, prefix: str) -> list[str]:
        found = self._answer(lambda: obstore.list_with_delimiter(self._store, prefix))
        return sorted(_name(entry["path"]) for entry in found["objects"])

    def folders(self, prefix: str) -> Sequence[str]:
        found = self._answer(lambda: obstore.list_with_delimiter(self._store, prefix))
        return sorted(_name(path) for path in found["common_prefixes"])

    def clear(self, prefix: str) -> None:
        if keys := sorted(self._all(prefix)):
            self._answer(lambda: obstore.delete(self._store, keys))

    def settle(self, prefix: str) -> None:
        """A put is durable before anyone can see it."""

    def zarr_store(self) -> Store:
        return ObjectStore(self._store, read_only=True)

    def _all(self, prefix: str) -> dict[str, int]:
        def everything() -> dict[str, int]:
            pages = obstore.list(self._store, prefix, chunk_size=1000)
            return {entry["path"]: entry["size"] for page in pages for entry in page}

        return self._answer(everything)

    def _found(self, request: Callable[[], T]) -> T | None:
        """The result of a request; None if its object does not exist."""

        def found() -> T | None:
            try:
                return request()
            except FileNotFoundError as error:
                _refuse_no_bucket(error)
                return None

        return self._answer(found)

    def _answer(self, request: Callable[[], T]) -> T:
        """The result of a request. A failure is reported in one sentence that names the store and what to do.

        Every request made here can safely be made twice.
        """
        pauses_s = iter(PAUSES_S)
        while True:
            try:
                return request()
            except (BaseError, FileNotFoundError) as error:
                pause_s = next(pauses_s, None) if _was_tried_once(error) else None
                if pause_s is None:
                    raise self._explained(error) from error
            time.sleep(pause_s)

    def _explained(self, error: Exception) -> OSError:
        text, where = map(without_secrets, (str(error), os.environ.get("AWS_ENDPOINT_URL") or "AWS"))
        code, message = (re.search(rf"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
        reason = f"{code[1]}: {message[1]}" if code and message else text.partition("\n")[0]
        if "NoSuchBucket" in text:
            return FileNotFoundError(
                f"{self.root}: {where} has no bucket {self.bucket!r}: make it, or name another store"
            )
        if "/latest/api/token" in text or "/latest/meta-data" in text:
            return PermissionError(
                f"{self.root}: there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the"
                " machine a role"
            )
        if re.search(r"status code: 40[13]", text):
            return PermissionError(
                f"{self.root}: {where} rejects these credentials ({reason}): they must be valid and allowed to list,"
                " get, put and delete in the bucket"
            )
        if "without LOCATION" in text:
            return OSError(f"{self.root}: the bucket is in another region: set AWS_REGION")
        if "HTTP error" in text:
            return ConnectionError(
                f"{self.root}: {where} cannot be reached ({reason}): check the network, AWS_ENDPOINT_URL and AWS_REGION"
            )
        return OSError(f"{self.root}: {reason}")


def _refuse_no_bucket(error: FileNotFoundError) -> None:
    """Raise the error again if the bucket is missing and not the object."""
    if "NoSuchBucket" in str(error):
        raise error


def _was_tried_once(error: Exception) -> bool:
    """Whether a failure may be temporary but was not retried by the client.

    The client does not retry a conditional put or a removal that takes too long, anything that takes longer than
    `RETRY_S`, and a listing whose answer breaks off.
    """
    text = str(error)
    return "HTTP error" in text and "retries, max_retries" not in text


def _name(path: str) -> str:
    return path.rpartition("/")[2]
