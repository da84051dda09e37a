"""Where a remote is: its URL and its options.

    s3://BUCKET/PREFIX      S3 and what speaks its language
    az://CONTAINER/PREFIX   Azure Blob Storage
    gs://BUCKET/PREFIX      Google Cloud Storage (not tested against a server)
    file:///FOLDER          a folder

Credentials are none of it: they come from the usual chain (profile, SSO, environment, the machine's role) whenever
the bucket is opened, and are never stored. A URL or an option that holds some is refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.remote.bucket import is_key

Option = str | int | bool

_EVERY = {"endpoint": str, "ca_file": str, "timeout_s": int, "anonymous": bool}
_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "s3": {**_EVERY, "region": str, "path_style": bool, "profile": str, "sse": str, "sse_kms_key_id": str},
    "az": {**_EVERY, "account": str},
    "gs": _EVERY,
    "file": {},
}
SSE = ("AES256", "aws:kms", "aws:kms:dsse")
"""Server-side encryption by a key of the store's. A customer's own is read from `AWS_SSE_CUSTOMER_KEY_BASE64`."""
TIMEOUT_S = 60
"""Without an answer, or a byte of one, before a request is given up and tried again."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", re.ASCII)
_ENDPOINT = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._/-]*)?", re.ASCII)
_SECRET = re.compile(r"secret|token|password|passwd|credential|access_?key|account_?key|sas_?key|signature", re.I)
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class RemoteAddress(msgspec.Struct, frozen=True, kw_only=True):
    """May be stored and shown: it holds no credentials. Made by `parse`."""

    url: str
    options: dict[str, Option] = {}

    @property
    def scheme(self) -> str:
        return self.url.partition(":")[0]

    @property
    def bucket(self) -> str:
        """Its name; "" of a folder."""
        return urlsplit(self.url).netloc

    @property
    def prefix(self) -> str:
        """Within the bucket, without slashes at its ends; of a folder its whole path."""
        path = unquote(urlsplit(self.url).path)
        return path if self.scheme == "file" else path.strip("/")


def parse(url: str, options: Mapping[str, Option] | None = None) -> RemoteAddress:
    """The address in its one form: no slash at the end, options of their types ("yes" becomes True).

    Raises `InvalidRequest` naming what is wrong, without repeating what may be a secret.
    """
    scheme, _, _ = url.partition("://")
    if "://" not in url or scheme not in _OPTIONS:
        raise InvalidRequest(
            f"the remote's URL starts with {scheme!r}, which thaw does not know: give one of s3://BUCKET/PREFIX, "
            "az://CONTAINER/PREFIX, gs://BUCKET/PREFIX, file:///FOLDER"
            if "://" in url
            else "a remote's URL is s3://BUCKET/PREFIX, az://CONTAINER/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER"
        )
    _refuse_secrets(url, options or {})
    given = {name: _option(scheme, name, value) for name, value in sorted((options or {}).items())}
    return RemoteAddress(url=_folder_url(url) if scheme == "file" else _bucket_url(url, scheme), options=given)


def timeout_s(address: RemoteAddress) -> float:
    return float(address.options.get("timeout_s", TIMEOUT_S))


def _refuse_secrets(url: str, options: Mapping[str, Option]) -> None:
    parts = _split(url, f"the {url.partition(':')[0]}:// URL")
    bucket = parts.scheme != "file"
    if "@" in unquote(parts.netloc) or parts.query or parts.fragment or (bucket and ":" in unquote(parts.netloc)):
        raise InvalidRequest(
            f"the {parts.scheme}:// URL has more than a bucket and a prefix (a user, a query or a fragment). "
            "Credentials come from the profile or the environment, other settings are options."
        )
    secret = [name for name in options if _SECRET.search(name)]
    if secret:
        raise InvalidRequest(
            f"the option {secret[0]!r} would store a credential: set it in the environment or in a profile instead"
        )
    endpoint = _split(str(options.get("endpoint", "")).strip(), "the endpoint")
    if "@" in unquote(endpoint.netloc) or endpoint.query or endpoint.fragment:
        raise InvalidRequest("the endpoint holds a user, a query or a fragment: give its scheme, host and port alone")


def _split(url: str, what: str) -> SplitResult:
    """Raises `InvalidRequest` where the host in brackets is no address, or the port none."""
    try:
        parts = urlsplit(url)
        _ = parts.port if parts.scheme in ("http", "https") else None
    except ValueError:
        raise InvalidRequest(f"{what} has a host or a port that cannot be one (ports are 0 to 65535)") from None
    return parts


def _option(scheme: str, name: str, value: Option) -> Option:
    known = _OPTIONS[scheme]
    if name not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise InvalidRequest(f"{name!r} is no option of a {scheme}:// remote; it takes: {listed}")
    typed = _TYPES[known[name]](name, value)
    if name == "endpoint":
        check_endpoint(str(typed))
    if name == "sse" and typed not in SSE:
        raise InvalidRequest(f"sse is {typed!r}; it is one of {', '.join(SSE)}")
    if name == "timeout_s" and not 1 <= int(typed) <= 3600:
        raise InvalidRequest(f"timeout_s is {typed}; it is from 1 to 3600 seconds")
    return typed


def check_endpoint(endpoint: str) -> None:
    """Raises `InvalidRequest`. obstore panics at some that are none."""
    parts = _split(endpoint, "the endpoint")
    if parts.scheme not in ("http", "https"):
        raise InvalidRequest(f"the endpoint {endpoint!r} starts with neither http:// nor https://")
    if not _ENDPOINT.fullmatch(endpoint):
        raise InvalidRequest(
            f"the endpoint {endpoint!r} is more or less than http(s)://HOST:PORT, with a path if need be"
        )
    if not _is_host(parts.hostname or ""):
        raise InvalidRequest(f"the endpoint {endpoint!r} names no host: {parts.hostname!r} is no name and no address")


def is_address(endpoint: str) -> bool:
    """Whether its host is an IP address: no bucket's name can stand before it."""
    try:
        ipaddress.ip_address(urlsplit(endpoint).hostname or "")
    except ValueError:
        return False
    return True


def _is_host(host: str) -> bool:
    """Whether it can be one: a name that ends in a number must be an address, and what starts with `xn--` is coded."""
    last = host.rstrip(".").rpartition(".")[2]
    try:
        if ":" in host or last.isdecimal() or last.startswith("0x"):
            ipaddress.ip_address(host)
        for label in host.split("."):
            if label.startswith("xn--"):
                label.encode().decode("idna")
    except ValueError:
        return False
    return True


def _text(name: str, value: Option) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"the option {name!r} is {value!r}; it takes a text")
    return value.strip()


def _number(name: str, value: Option) -> int:
    try:
        if isinstance(value, bool):
            raise ValueError
        return int(value)
    except ValueError:
        raise InvalidRequest(f"the option {name!r} is {value!r}; it takes a whole number") from None


def _switch(name: str, value: Option) -> bool:
    word = str(value).lower()
    if word not in _TRUE + _FALSE:
        raise InvalidRequest(f"the option {name!r} is {value!r}; it takes true or false")
    return word in _TRUE


_TYPES: Mapping[type, Callable[[str, Option], Option]] = {str: _text, int: _number, bool: _switch}


def _bucket_url(url: str, scheme: str) -> str:
    parts = urlsplit(url)
    if not _BUCKET.fullmatch(parts.netloc):
        raise InvalidRequest(
            f"the bucket's name {parts.netloc!r} is not one: 3 to 63 lower-case letters, digits, and . - _ between them"
        )
    prefix = unquote(parts.path).strip("/")
    if prefix and (not is_key(prefix) or len(prefix) > 300):
        raise InvalidRequest(
            f"the prefix {prefix!r} cannot be used: give parts of letters, digits and _ . = - with / between them, "
            "none starting with a dot, 300 characters at most"
        )
    return f"{scheme}://{parts.netloc}" + (f"/{prefix}" if prefix else "")


def _folder_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidRequest(f"{url!r} names no folder from the root: write file:///FOLDER")
    folder = Path(unquote(parts.path))
    if ".." in folder.parts or len(folder.parts) < 2:
        raise InvalidRequest(f"{url!r} names no folder of a remote's own: give one from the root, without ..")
    return folder.as_uri()


def settings(address: RemoteAddress, names: Mapping[str, str]) -> dict[str, Any]:
    """The options that are set, under the store's own names for them."""
    return {names[name]: value for name, value in address.options.items() if name in names}
