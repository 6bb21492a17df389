"""S3 that refuses access: the reason and the remedy are named at once. And S3 that is public, or behind TLS."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.sample import read_record
from shard_tools.storage.base import StoreConfig
from tests.conftest import Command
from tests.faulty_proxy import FaultyProxy
from tests.odd_server import Answer, Asked, OddServer, speak_tls, write_certificate
from tests.range_server import serving
from tests.s3_server import serving_s3
from tests.tiny import pack_tiny

URL = "s3://bucket/v2@main/2021-08-18T12:00"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("tiny"), 12, 3)


@pytest.fixture(scope="module")
def moto(manifest: Manifest) -> Iterator[int]:
    """The port of an S3 server that holds the data set, in a bucket that everybody may read."""
    with serving_s3(manifest, URL, "public-read") as port:
        yield port


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PROFILE", "SESSION_TOKEN", "CA_BUNDLE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(tmp_path / "none"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddServer]:
    """An S3 server that gives the answers of a test."""
    with OddServer(lambda asked: Answer(500)) as server, serving(server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


def refusal(status: int, code: str, more: str = "", **headers: str) -> Any:
    """An answer of S3 with an error code in its body, which a HEAD does not get."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>range</Message>{more}</Error>'
    sent = {"Content-Type": "application/xml", **{name.replace("_", "-"): value for name, value in headers.items()}}

    def answer(asked: Asked) -> Answer:
        return Answer(status, sent, body.encode())

    return answer


REFUSALS = {
    "expired": (refusal(400, "ExpiredToken"), "credentials have expired .*400, ExpiredToken.*AWS_SESSION_TOKEN"),
    "expired, as others say it": (refusal(403, "ExpiredToken"), "credentials have expired .*403"),
    "token": (refusal(400, "InvalidToken"), "credentials have expired .*InvalidToken"),
    "clock": (refusal(403, "RequestTimeTooSkewed"), "clocks .*403, RequestTimeTooSkewed.*timedatectl"),
    "key": (refusal(403, "InvalidAccessKeyId"), "does not accept the credentials .*AWS_ACCESS_KEY_ID"),
    "signature": (refusal(403, "SignatureDoesNotMatch"), "does not accept the credentials .*AWS_SECRET_ACCESS_KEY"),
    "rights": (refusal(403, "AccessDenied"), r"refuses access .*403, AccessDenied.*credentials.*s3:ListBucket"),
    "region": (
        refusal(301, "PermanentRedirect", x_amz_bucket_region="eu-west-3"),
        "another region .*301, PermanentRedirect.*AWS_DEFAULT_REGION=eu-west-3",
    ),
    "signed for another region": (
        refusal(400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"),
        "another region .*400, AuthorizationHeaderMalformed.*AWS_DEFAULT_REGION=eu-west-3",
    ),
    "no bucket": (refusal(404, "NoSuchBucket"), "no such bucket .*404, NoSuchBucket.*AWS_ENDPOINT_URL"),
    "not made": (refusal(501, "NotImplemented"), "status 501"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_of_s3_is_an_error_at_once_with_its_remedy(store: OddServer, command: Command, kind: str) -> None:
    store.answer, said = REFUSALS[kind]
    answer = command("info", URL)
    assert answer.code == 1 and answer.err.count("\n") == 1
    assert answer.err.startswith(f"error: {URL}/manifest.json: ")
    assert re.search(said, answer.err)
    assert len(store.asked) <= 6  # a HEAD, a GET for the reason, and botocore's own questions for the region


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_while_samples_are_read_is_an_error_at_once(
    moto: int, monkeypatch: pytest.MonkeyPatch, store: OddServer, kind: str
) -> None:
    with FaultyProxy(moto) as proxy, serving(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        remote = read_manifest(URL)
        proxy.port = store.server_port
        store.answer, said = REFUSALS[kind]
        with pytest.raises(InputError) as caught:
            read_record(remote, 0)
        if kind == "no bucket":
            assert "no such shard" in str(caught.value) or re.search(said, str(caught.value))
        else:
            assert isinstance(caught.value, StoreError) and re.search(said, str(caught.value))
        assert "Signature" not in str(caught.value).replace("SignatureDoesNotMatch", "")
        assert len(store.asked) <= 6


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (400, "RequestTimeout"), (500, "InternalError")])
def test_a_store_that_is_busy_is_asked_again(
    moto: int, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, store: OddServer, status: int, code: str
) -> None:
    with FaultyProxy(moto) as proxy, serving(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store.answer = refusal(status, code)

        def fault(request: object) -> None:
            proxy.port = store.server_port if len(store.asked) < 3 else moto

        proxy.fault = fault
        assert read_manifest(URL).identity == manifest.identity
        assert len(store.asked) == 3


def test_missing_credentials_are_an_error_at_once_that_names_public_buckets(
    store: OddServer, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    answer = command("info", URL)
    assert "no credentials were found" in answer.err and "FSSPEC_S3_ANON=true" in answer.err
    assert (answer.code, answer.err.count("\n"), store.asked) == (1, 1, [])


def test_half_of_the_credentials_and_an_unknown_profile_are_errors_at_once(
    store: OddServer, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS settings do not work" in command("info", URL).err
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in command("info", URL).err
    assert store.asked == []


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment that is advised for a public bucket. fsspec has read its own part already, on import."""
    import fsspec.config

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    before = dict(fsspec.config.conf)
    fsspec.config.set_conf_env(fsspec.config.conf)
    yield
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)


def test_a_public_bucket_is_read_without_credentials(
    moto: int, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, public: None
) -> None:
    with FaultyProxy(moto) as proxy, serving(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        remote = read_manifest(URL)
        for row in range(len(manifest)):
            assert np.array_equal(read_record(remote, row), read_record(manifest, row))


def test_a_path_may_hold_an_at_sign_and_colons(moto: int, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto}")
    remote = read_manifest(URL)
    for row in range(len(manifest)):
        assert np.array_equal(read_record(remote, row), read_record(manifest, row))


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE", None])
def test_s3_over_tls_trusts_what_one_variable_names(
    moto: int, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    certificate = write_certificate(tmp_path)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if variable:
        monkeypatch.setenv(variable, str(certificate.with_name("certificate.pem")))
    with FaultyProxy(moto) as proxy:
        speak_tls(proxy, certificate)
        with serving(proxy):
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{proxy.server_port}")
            if variable:
                assert np.array_equal(read_record(read_manifest(URL), 0), read_record(manifest, 0))
            else:
                with pytest.raises(StoreError, match=r"certificate is not trusted .*SSL_CERT_FILE"):
                    read_manifest(URL)


def test_a_pack_into_a_bucket_that_is_not_there_says_so_before_it_packs(
    moto: int, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto}")
    staging = tmp_path / "staging"
    with pytest.raises(StoreError, match="no such bucket"):
        pack(PackConfig(manifest.root.parent / "data", "s3://no-such-bucket/data", staging, folds=5, workers=1))
    assert not list(staging.rglob("*.tar"))


def test_a_pack_onto_a_web_server_is_refused_before_any_request(
    store: OddServer, manifest: Manifest, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="a web server is read, not written"):
        pack(PackConfig(manifest.root.parent / "data", f"{store.url}/data", tmp_path / "staging", folds=5, workers=1))
    assert store.asked == []


def test_an_unreachable_store_says_so_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="no answer for 1 s"):
        read_manifest(URL, StoreConfig(store_timeout=1))
