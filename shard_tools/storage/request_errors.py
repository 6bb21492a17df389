"""Find the cause of a failed request to a store, and what fixes it.

Errors are judged by status codes, the stores' own codes and exception types, never by their texts: these hold names of
hosts and files, and change from version to version.
"""

import json
import re
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

_TRY_AGAIN = (408, 409, 425, 429, *(status for status in range(500, 600) if status not in (501, 505)))
_TRY_AGAIN_CODES = ("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")  # with status 400
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))  # EAI_AGAIN is temporary
# OpenSSL's reasons where the other side speaks no TLS, or a version that OpenSSL refuses.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL")


class StatusError(Exception):
    """A web server's answer with an unexpected status."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str]) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class Remedy:
    """An error that no retry fixes, and what to do about it."""

    problem: str
    advice: str


_EXPIRED = Remedy(
    "the credentials have expired", "fetch new ones (`aws sso login`, or a new AWS_SESSION_TOKEN with its keys)"
)
_UNKNOWN_KEY = Remedy(
    "the store does not accept the credentials", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
)
_REGION = Remedy("the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's own")
_BY_CODE = {
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": _UNKNOWN_KEY,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "RequestTimeTooSkewed": Remedy(
        "the clocks of the store and of this machine differ too much", "set this machine's clock (`timedatectl`)"
    ),
    "NoSuchBucket": Remedy("the store has no such bucket", "check the URL, and AWS_ENDPOINT_URL where it is set"),
}
_BY_STATUS = {
    401: Remedy("the server asks for a sign-in", "put machine, login and password into ~/.netrc, or renew them"),
    403: Remedy(
        "the store refuses access",
        "check the credentials in the environment (AWS_...), the files' permissions, and the address: without the "
        "right to list the bucket (s3:ListBucket) a missing file is refused too",
    ),
    407: Remedy("the proxy asks for a sign-in", "check HTTPS_PROXY and HTTP_PROXY"),
}
_CERTIFICATE = Remedy(
    "the server's certificate is not trusted",
    "if you trust it, set SSL_CERT_FILE to its authority's certificate; otherwise check the address and this machine's "
    "clock",
)
_PLAIN = Remedy("the server does not speak TLS there", "check the port, or use http:// if TLS is not intended")
_NAME = Remedy("there is no host of that name", "check the address, and whether this machine can see it")
_REDIRECT = Remedy("the server redirects from address to address", "give the final address of the files")
_ADDRESS = Remedy("not an address that the store takes", "check the URL")
_NO_CREDENTIALS = Remedy(
    "no credentials were found",
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket set FSSPEC_S3_ANON=true",
)
_SETTINGS = Remedy("the AWS settings do not work", "correct the setting named here, in AWS_... or ~/.aws")
_GOOGLE = Remedy("the credentials do not work", "renew them (`gcloud auth application-default login`)")


def find_remedy(error: BaseException, host_is_known: bool = False) -> Remedy | None:
    """The remedy for an error that no retry fixes; None where a retry may help.

    `host_is_known`: it answered before, so a failed look-up of its name is taken to be temporary.
    """
    chain = list(_causes(error))
    status, code = status_of(error), code_of(error)
    if status and not (status in _TRY_AGAIN or code in _TRY_AGAIN_CODES):
        return _of_status(status, code, error)
    if code == "NoSuchBucket":
        return _BY_CODE[code]
    if any(isinstance(cause, socket.gaierror) and cause.errno in _NO_SUCH_NAME for cause in chain):
        return None if host_is_known else _NAME
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain):
        return _CERTIFICATE
    # Aiohttp's own SSLError has no reason, but its cause has.
    if any(isinstance(cause, ssl.SSLError) and getattr(cause, "reason", "") in _NO_TLS for cause in chain):
        return _PLAIN
    return _of_settings(error)


def status_of(error: BaseException) -> int:
    """The HTTP status of an error; 0 where it has none."""
    for cause in _causes(error):
        if isinstance(cause, aiohttp.TooManyRedirects):
            return cause.history[-1].status
        if isinstance(cause, StatusError | aiohttp.ClientHttpProxyError):
            return cause.status
        if _is_a(cause, "botocore.exceptions", "ClientError"):
            return int(_answer(cause).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if _is_a(cause, "gcsfs.retry", "HttpError"):
            return int(getattr(cause, "code", 0) or 0)
    # Gcsfs turns a 403, and nothing else, into an OSError without errno or cause.
    return 403 if type(error) is OSError and error.errno is None and not _behind(error) else 0


def code_of(error: BaseException) -> str:
    """S3's error code, such as ExpiredToken; empty where there is none."""
    codes = (_answer(cause).get("Error", {}).get("Code", "") for cause in _causes(error))
    return next((str(code) for code in codes if code), "")


def seconds_to_wait(error: BaseException) -> float:
    """How long a server asks us to stay away (Retry-After); 0 where it does not."""
    for cause in _causes(error):
        headers = cause.headers if isinstance(cause, StatusError) else _headers(cause)
        said = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
        if said.isdigit():
            return float(said)
        if said:
            return _seconds_until(said)
    return 0.0


def describe(error: BaseException) -> str:
    """Status, code and text of an error, short and without the signature of a signed URL."""
    status, code = status_of(error), code_of(error)
    text = " ".join(re.sub(r"\?[^\s'\"]*", "", str(error)).split())[:200]
    kind = "" if isinstance(error, StatusError) else type(error).__name__
    words = ["" if not status else f"status {status}", code if not code.isdigit() else "", text if code else kind]
    return ", ".join(word for word in words if word) + (f": {text}" if text and not code else "")


def _of_status(status: int, code: str, error: BaseException) -> Remedy:
    if code in _BY_CODE or status in (301, 307):
        remedy = _BY_CODE.get(code, _REGION if code else _REDIRECT)
        region = next(filter(None, map(_region, _causes(error))), "")
        return Remedy(remedy.problem, f"set AWS_DEFAULT_REGION={region}") if remedy is _REGION and region else remedy
    if 300 <= status < 400:
        return _REDIRECT
    return _BY_STATUS.get(status, Remedy(f"the server refuses the request with status {status}", "check the address"))


def _of_settings(error: BaseException) -> Remedy | None:
    """The remedy for an error on our side, before any answer."""
    if isinstance(error, aiohttp.RedirectClientError):
        return _REDIRECT
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return _ADDRESS  # such as aiohttp.InvalidURL
    if _is_a(error, "google.auth.exceptions", "DefaultCredentialsError", "RefreshError"):
        return None if getattr(error, "retryable", False) else _GOOGLE
    if not _is_a(error, "botocore.exceptions", "BotoCoreError"):
        return None
    if _is_a(error, "botocore.exceptions", "ParamValidationError"):
        return _ADDRESS
    if _is_a(error, "botocore.exceptions", "NoCredentialsError"):
        return _NO_CREDENTIALS
    passing = "HTTPClientError", "ConnectionError", "ChecksumError", "IncompleteReadError"
    return None if _is_a(error, "botocore.exceptions", *passing) else _SETTINGS


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the chain of its causes."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = _behind(found)


def _behind(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_a(error: BaseException, module: str, *kinds: str) -> bool:
    """Whether an error belongs to an optional library, whose error classes exist only if it was imported."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(error, tuple(getattr(loaded, kind) for kind in kinds))


def _answer(error: BaseException) -> Mapping[str, Any]:
    """What botocore read from a store's answer."""
    found = getattr(error, "response", None)
    return found if isinstance(found, Mapping) else {}


def _headers(error: BaseException) -> Mapping[str, str]:
    return dict(_answer(error).get("ResponseMetadata", {}).get("HTTPHeaders", {}))


def _region(error: BaseException) -> str:
    return str(_answer(error).get("Error", {}).get("Region") or _headers(error).get("x-amz-bucket-region", ""))


def _seconds_until(date: str) -> float:
    """Seconds until a date in HTTP's format; 0 where it is invalid or past."""
    try:
        when = parsedate_to_datetime(date)
    except ValueError:
        return 0.0
    return max(0.0, (when - datetime.now(when.tzinfo and UTC)).total_seconds())
