"""A real S3 server on loopback that holds a data set."""

import contextlib
import logging
from collections.abc import Iterator

import boto3
from moto.server import ThreadedMotoServer

from shard_tools.manifest import Manifest
from tests.conftest import folder_bytes


@contextlib.contextmanager
def serving_s3(manifest: Manifest, url: str, acl: str = "private") -> Iterator[int]:
    """The port of a server on which a data set lies at `url` (s3://bucket/path)."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        client = boto3.client(
            "s3", "us-east-1", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id="x", aws_secret_access_key="y"
        )
        bucket, _, path = url.removeprefix("s3://").partition("/")
        client.create_bucket(Bucket=bucket, ACL=acl)
        for name, data in folder_bytes(manifest.root).items():
            client.put_object(Bucket=bucket, Key=f"{path}/{name}", Body=data, ACL=acl)
        yield port
    finally:
        server.stop()
