"""An S3 server in one of the `hosts`, and a bucket that keeps every version, so that every put under a key is known."""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from hosts import Host, signal_to
from patience import HUNG_S
from s3_server import make_bucket, start_server

PREFIX = "deep/routes.zarr"


class Bucket:
    """A bucket of the server.

    Parameters
    ----------
    host, address
        The server's host, and its address.
    """

    def __init__(self, host: Host, address: str) -> None:
        self._host = host
        with host.network():
            self._name = make_bucket(address)
            known = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
            self._client: Any = boto3.client("s3", endpoint_url=address, **known)
            self._client.put_bucket_versioning(Bucket=self._name, VersioningConfiguration={"Status": "Enabled"})
        self.url = f"s3://{self._name}/{PREFIX}"

    def files(self) -> dict[str, bytes]:
        """Every object of the store by its key."""
        with self._host.network():
            keys = [one["Key"] for one in self._all("list_objects_v2", "Contents")]
            found = {key: self._client.get_object(Bucket=self._name, Key=key)["Body"].read() for key in keys}
        return {key.removeprefix(f"{PREFIX}/"): data for key, data in found.items()}

    def puts(self) -> Counter[str]:
        """How often something was put under a key, or removed."""
        with self._host.network():
            found = self._all("list_object_versions", "Versions") + self._all("list_object_versions", "DeleteMarkers")
        return Counter(one["Key"].removeprefix(f"{PREFIX}/") for one in found)

    def uploads(self) -> list[str]:
        """Keys of multipart uploads that were started but not finished."""
        with self._host.network():
            return [one["Key"] for one in self._all("list_multipart_uploads", "Uploads")]

    def _all(self, listing: str, of: str) -> list[dict[str, Any]]:
        pages = self._client.get_paginator(listing).paginate(Bucket=self._name)
        return [one for page in pages for one in page.get(of, [])]


@contextmanager
def server_in(host: Host) -> Iterator[str]:
    """The address of a server that runs in a host during the block."""
    with host.network():
        process, address = start_server(host.address, host.popen)
    try:
        yield address
    finally:
        signal_to(process, signal.SIGTERM)
        process.wait(HUNG_S)
