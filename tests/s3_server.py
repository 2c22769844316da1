"""A bucket on an S3 server of a test's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer

from pukd_ray import storage


@contextmanager
def serve_bucket(name: str) -> Iterator[ThreadedMotoServer]:
    """The server, of which this process and those that it starts have the address and credentials."""
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(key, value)
        boto3.client("s3").create_bucket(Bucket=name)
        storage._open_bucket.cache_clear()
        yield server
        storage._open_bucket.cache_clear()
    server.stop()
