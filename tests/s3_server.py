"""A real S3 server on loopback that holds a data set."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from shard_tools.manifest import Manifest
from tests.conftest import folder_bytes
from tests.faulty_proxy import FaultyProxy
from tests.range_server import serving


@contextlib.contextmanager
def serving_s3(manifest: Manifest, url: str, acl: str = "private") -> Iterator[int]:
    """The port of a server on which a data set lies at `url` (s3://bucket/path)."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        client = s3_client(port)
        bucket, _, path = url.removeprefix("s3://").partition("/")
        client.create_bucket(Bucket=bucket, ACL=acl)
        for name, data in folder_bytes(manifest.root).items():
            client.put_object(Bucket=bucket, Key=f"{path}/{name}", Body=data, ACL=acl)
        yield port
    finally:
        server.stop()


def environment(url: str) -> dict[str, str]:
    """The environment variables that lead a program to the server at a URL."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**keys, "AWS_ENDPOINT_URL": url}


@contextlib.contextmanager
def through_proxy(port: int) -> Iterator[FaultyProxy]:
    """A proxy in front of a server; this process's environment leads to the proxy."""
    with pytest.MonkeyPatch.context() as patch, FaultyProxy(port) as proxy, serving(proxy):
        for name, value in environment(proxy.url).items():
            patch.setenv(name, value)
        yield proxy
        proxy.released.set()


def s3_client(port: int) -> Any:
    return boto3.client(
        "s3", "us-east-1", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id="x", aws_secret_access_key="y"
    )


def read_s3(port: int, path: str, bucket: str = "bucket") -> dict[str, bytes]:
    """Every file under a path of the server, by its name below that path."""
    client = s3_client(port)
    found = client.list_objects_v2(Bucket=bucket, Prefix=f"{path}/").get("Contents", [])
    read = {}
    for key in (str(entry["Key"]) for entry in found):
        with contextlib.suppress(client.exceptions.NoSuchKey):  # it has been removed
            read[key.removeprefix(f"{path}/")] = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    return read
