"""Shards behind web servers like real ones: with odd habits, with sign-ins, with limits, over TLS."""

import gzip
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.sample import read_record
from shard_tools.storage.base import StoreConfig
from shard_tools.storage.remote import RemoteStore
from tests.conftest import Command
from tests.odd_server import Answer, Asked, OddServer, speak_tls, write_certificate
from tests.range_server import serving
from tests.tiny import pack_tiny

PAGE = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
HTML = {"Content-Type": "text/html; charset=utf-8"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("tiny"), 12, 3)


@pytest.fixture
def served(manifest: Manifest) -> Iterator[OddServer]:
    """A server of the data set, which answers as it should until a test changes its answers."""
    with OddServer(lambda asked: part(manifest, asked)) as server, serving(server):
        yield server


def part(manifest: Manifest, asked: Asked, **changed: Any) -> Answer:
    """The right answer to a ranged request."""
    path = manifest.root / asked.path.rpartition("/")[2]
    if not path.is_file():
        return Answer(404)
    ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("range", ""))
    if not ranged:
        return whole(manifest, asked, **changed)
    data, start = path.read_bytes(), int(ranged[1])
    body = data[start : int(ranged[2]) + 1]
    headers = {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(data)}"}
    return Answer(206, headers, body, **changed)


def whole(manifest: Manifest, asked: Asked, **changed: Any) -> Answer:
    """The answer of a server that ignores ranges."""
    return Answer(200, {}, (manifest.root / asked.path.rpartition("/")[2]).read_bytes(), **changed)


def elsewhere(manifest: Manifest, asked: Asked) -> Answer:
    """The answer of a server that redirects each file once."""
    if asked.path.startswith("/moved"):
        return part(manifest, asked)
    return Answer(302, {"Location": "/moved" + asked.path})


def without_head(manifest: Manifest, asked: Asked) -> Answer:
    return Answer(405) if asked.method == "HEAD" else part(manifest, asked)


def compressing_if_taken(manifest: Manifest, asked: Asked) -> Answer:
    if "gzip" in asked.headers.get("accept-encoding", ""):
        return Answer(200, {"Content-Encoding": "gzip"}, gzip.compress(whole(manifest, asked).body))
    return part(manifest, asked)


@pytest.mark.parametrize(
    "habit",
    [
        without_head,
        elsewhere,
        compressing_if_taken,
        lambda manifest, asked: part(manifest, asked, chunked=True),
    ],
    ids=["no HEAD", "redirects", "gzip", "chunked"],
)
def test_a_server_with_a_habit_gives_every_sample(
    served: OddServer, manifest: Manifest, habit: Callable[[Manifest, Asked], Answer]
) -> None:
    served.answer = lambda asked: habit(manifest, asked)
    remote = read_manifest(f"{served.url}/data")
    for row in range(len(manifest)):
        assert np.array_equal(read_record(remote, row), read_record(manifest, row))


def to_sign_in(asked: Asked) -> Answer:
    if asked.path.startswith("/login"):
        return Answer(200, HTML, PAGE)
    return Answer(302, {"Location": "/login?next=secret"})


REFUSALS: dict[str, tuple[Callable[[Asked], Answer], str]] = {
    "login": (to_sign_in, r"got a web page, not the file \(status 200, text/html from http\S+/login\).*sign-in"),
    "page": (lambda asked: Answer(200, HTML, PAGE), "got a web page, not the file"),
    "ranged page": (
        lambda asked: Answer(206, {**HTML, "Content-Range": f"bytes 0-0/{len(PAGE)}"}, PAGE[:1]),
        "got a web page, not the file",
    ),
    "no size": (lambda asked: Answer(200, {}, b"{}", chunked=True), r"does not say its size \(status 200\).*ranges"),
    "gzip": (lambda asked: Answer(200, {"Content-Encoding": "gzip"}, gzip.compress(b"{}")), "switch compression off"),
    "loop": (lambda asked: Answer(302, {"Location": asked.path + "x"}), "from address to address.*status 302"),
    "nowhere": (lambda asked: Answer(304), "from address to address.*status 304"),
    "odd address": (lambda asked: Answer(302, {"Location": "ftp://host/file"}), "from address to address"),
    "400": (lambda asked: Answer(400), "refuses the request with status 400.*check the address"),
    "401": (lambda asked: Answer(401), "asks for a sign-in .*status 401.*netrc"),
    "403": (lambda asked: Answer(403), "refuses access .*status 403.*check"),
    "405": (lambda asked: Answer(405), "refuses the request with status 405"),
    "501": (lambda asked: Answer(501), "refuses the request with status 501"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_an_answer_that_no_retry_mends_is_an_error_at_once(served: OddServer, command: Command, kind: str) -> None:
    served.answer, said = REFUSALS[kind]
    answer = command("info", f"{served.url}/data")
    assert answer.code == 1 and answer.err.count("\n") == 1
    assert answer.err.startswith(f"error: {served.url}/data/manifest.json: ")
    assert re.search(said, answer.err) and "secret" not in answer.err
    assert len(served.asked) <= 11 if kind in ("loop",) else len(served.asked) <= 2


def test_a_missing_manifest_is_named_as_missing(served: OddServer, command: Command) -> None:
    served.answer = lambda asked: Answer(404, HTML, PAGE)
    assert "manifest.json: no such file" in command("info", f"{served.url}/data").err
    assert len(served.asked) == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_shard_without_ranges_is_refused_at_once(served: OddServer, manifest: Manifest, chunked: bool) -> None:
    remote = read_manifest(f"{served.url}/data")
    served.answer, before = (lambda asked: whole(manifest, asked, chunked=chunked)), len(served.asked)
    for row in (0, 5):
        with pytest.raises(StoreError, match=r"ignores ranges .*choose a server that serves ranges"):
            read_record(remote, row)
    assert len(served.asked) - before == 2


def test_the_pause_that_a_server_asks_for_is_kept(served: OddServer, manifest: Manifest) -> None:
    limited_at, early = list[float](), list[Asked]()

    def limit(asked: Asked) -> Answer:
        if len(limited_at) < 2:
            limited_at.append(time.monotonic())
            return Answer(429, {"Retry-After": "1"})
        if time.monotonic() < limited_at[-1] + 1:
            early.append(asked)
        return part(manifest, asked)

    served.answer = limit
    assert read_manifest(f"{served.url}/data").identity == manifest.identity
    assert len(limited_at) == 2 and not early


@pytest.mark.parametrize("pause", ["3600", "Fri, 31 Dec 2199 23:59:59 GMT"])
def test_a_pause_beyond_the_time_out_is_an_error_at_once(served: OddServer, pause: str) -> None:
    served.answer = lambda asked: Answer(429, {"Retry-After": pause})
    with pytest.raises(StoreError, match=r"asks for a pause of \d+ s .*status 429.*--store-timeout 60"):
        read_manifest(f"{served.url}/data")
    assert len(served.asked) == 1


@pytest.mark.parametrize("pause", ["soon", "-1", "Fri, 31 Dec 1999 23:59:59 GMT", "0"])
def test_an_odd_pause_is_none(served: OddServer, manifest: Manifest, pause: str) -> None:
    served.answer = lambda asked: (
        Answer(503, {"Retry-After": pause}) if len(served.asked) == 1 else part(manifest, asked)
    )
    assert read_manifest(f"{served.url}/data").identity == manifest.identity


def test_a_long_wait_is_told_once(served: OddServer, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("shard_tools.storage.remote._SILENT_SECONDS", 0.2)
    served.answer = lambda asked: Answer(500)
    with pytest.raises(StoreError, match=r"no answer for 2 s .*status 500"):
        read_manifest(f"{served.url}/data", StoreConfig(store_timeout=1.5))
    (told,) = [record.getMessage() for record in caplog.records if record.name == "shard_tools.storage.remote"]
    assert f"{served.url}/data/manifest.json: no answer for" in told and "status 500" in told and "trying again" in told


def lookups(monkeypatch: pytest.MonkeyPatch, *errors: int, name: str = "store.invalid") -> list[str]:
    """Make the next look-ups of a host's name fail with `errors`, and later ones find loopback."""
    asked, left, real = list[str](), list(errors), socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **more: Any) -> Any:
        if host != name:
            return real(host, *rest, **more)
        asked.append(host)
        if left:
            raise socket.gaierror(left.pop(0), "no range of names")  # the text of the error must not matter
        return real("127.0.0.1", *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_an_unknown_host_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    asked = lookups(monkeypatch, *[socket.EAI_NONAME] * 9)
    answer = command("info", "http://store.invalid/data")
    assert "http://store.invalid/data/manifest.json: there is no host of that name" in answer.err
    assert (answer.code, answer.err.count("\n"), len(asked)) == (1, 1, 1)


def test_a_name_server_that_is_away_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, served: OddServer, manifest: Manifest
) -> None:
    asked = lookups(monkeypatch, socket.EAI_AGAIN, socket.EAI_AGAIN)
    assert read_manifest(f"http://store.invalid:{served.server_port}/data").identity == manifest.identity
    assert len(asked) >= 3


def test_a_host_that_answered_before_is_looked_up_again(
    monkeypatch: pytest.MonkeyPatch, served: OddServer, manifest: Manifest
) -> None:
    store = RemoteStore(f"http://127.0.0.1:{served.server_port}/data", StoreConfig())
    assert store.size("manifest.json")
    asked = lookups(monkeypatch, socket.EAI_NONAME, socket.EAI_NONAME)
    store._base = f"http://store.invalid:{served.server_port}/data"  # by name: a name server may forget it
    assert store.size("manifest.json") and len(asked) >= 3


def test_an_unreachable_store_named_like_a_range_is_no_short_file(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups(monkeypatch, name="orange.invalid")
    with socket.socket() as closed:  # bound, so that nobody else takes the port, but not listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://orange.invalid:{closed.getsockname()[1]}/data"
        store = RemoteStore(url, StoreConfig(store_timeout=0.5))
        with pytest.raises(StoreError, match="no answer"):
            store.read_record("train-000000.tar", 0, [np.zeros(9, np.uint8)], lambda found: pytest.fail("an answer"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure(manifest: Manifest, certificate: Path) -> Iterator[str]:
    """The URL of the data set over TLS, with a certificate that nobody trusts by default."""
    with OddServer(lambda asked: part(manifest, asked)) as server:
        speak_tls(server, certificate)
        with serving(server):
            yield f"https://localhost:{server.server_port}"


def test_a_trusted_certificate_gives_every_sample(
    secure: str, manifest: Manifest, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("certificate.pem")))
    remote = read_manifest(secure)
    for row in range(len(manifest)):
        assert np.array_equal(read_record(remote, row), read_record(manifest, row))


def test_an_untrusted_certificate_is_an_error_at_once(
    secure: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    answer = command("info", secure)
    assert f"{secure}/manifest.json: the server's certificate is not trusted" in answer.err
    assert "SSL_CERT_FILE" in answer.err and (answer.code, answer.err.count("\n")) == (1, 1)


def test_certificates_that_are_not_there_are_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/authority.pem")
    assert "SSL_CERT_FILE=/no/such/authority.pem: no such file" in command("info", "https://localhost:1/data").err


def test_tls_to_a_server_without_it_is_an_error_at_once(served: OddServer, command: Command) -> None:
    answer = command("info", served.url.replace("http:", "https:"))
    assert "the server does not speak TLS there" in answer.err and answer.err.count("\n") == 1


def test_a_name_and_password_of_netrc_open_a_server(
    served: OddServer, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    served.answer = lambda asked: part(manifest, asked) if "authorization" in asked.headers else Answer(401)
    assert read_manifest(f"{served.url}/data").identity == manifest.identity


def test_a_path_may_hold_an_at_sign_and_colons(served: OddServer, manifest: Manifest) -> None:
    remote = read_manifest(f"{served.url}/v2@main/2021-08-18T12:00")
    assert np.array_equal(read_record(remote, 0), read_record(manifest, 0))
    assert served.asked[0].path == "/v2@main/2021-08-18T12:00/manifest.json"


@pytest.mark.parametrize("url", ["https://me:secret@host/data", "s3://key:secret@bucket/a@b"])
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InputError, match="credentials in a URL") as caught:
        read_manifest(url)
    assert "secret" not in str(caught.value)
