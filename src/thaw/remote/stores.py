"""obstore's stores for an address: what of the options goes where, and who gives the credentials.

S3's come from boto3 where it is installed (environment, profile, SSO, the machine's role), else from obstore itself
(environment and the machine's role); Azure's and Google's from obstore. They stay in the store's memory.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from thaw.core.errors import InvalidRequest, RemoteDenied, Unsupported
from thaw.remote.location import RemoteAddress, check_endpoint, is_address, settings, timeout_s
from thaw.remote.retry import FIRST_WAIT_S, LONGEST_WAIT_S, PATIENCE

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from thaw.remote.obstore import ObjectBucket

Maker = Callable[[RemoteAddress, Mapping[str, Any]], "Callable[[int], ObjectStore]"]

KEYS_LAST = timedelta(minutes=10)
"""Keys that boto3 gave are asked for again after that: it renews its own when they have ten minutes left."""
INSTALL = "pip install 'thaw-vllm[s3]' (Python 3.11 or newer)"


def obstore_bucket(address: RemoteAddress, maker: Maker) -> ObjectBucket:
    """Raises `Unsupported` where obstore is not installed."""
    if importlib.util.find_spec("obstore") is None:
        raise Unsupported(f"a {address.scheme}:// remote needs the package obstore, which is not installed: {INSTALL}")
    from obstore.exceptions import BaseError

    from thaw.remote.obstore import ObjectBucket

    make = maker(address, _client(address))
    try:
        return ObjectBucket(address.url, address.prefix, make, timeout_s=timeout_s(address))
    except (BaseError, ValueError, OSError) as error:
        raise _unfit(address, str(error)) from None


def _unfit(address: RemoteAddress, said: str) -> InvalidRequest:
    """obstore's text is not repeated: it may hold what the environment gave."""
    if "MissingAccount" in said:
        return InvalidRequest(f"{address.url} lacks the storage account: give the option account=NAME")
    if "InvalidCertificate" in said:
        return InvalidRequest(f"the ca_file of {address.url} holds no certificate that can be read")
    return InvalidRequest(
        f"{address.url} cannot be opened: its options, or the variables in the environment for such stores, do not fit"
    )


def _s3(address: RemoteAddress, client: Mapping[str, Any]) -> Callable[[int], ObjectStore]:
    from obstore.store import S3Store

    config: Any = settings(
        address, {"region": "region", "sse": "server_side_encryption", "sse_kms_key_id": "sse_kms_key_id"}
    )
    endpoint = (
        address.options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    if endpoint:
        check_endpoint(str(endpoint))
    path_style = address.options.get("path_style", bool(endpoint) or "." in address.bucket)
    config["virtual_hosted_style_request"] = not path_style
    config["disable_bulk_delete"] = True  # not every store has it, and those that lack it say 501
    if endpoint and not path_style and is_address(str(endpoint)):
        raise InvalidRequest(
            f"path_style=false puts the bucket before the host, and the endpoint {endpoint} has an IP address: leave "
            "path_style out"
        )
    if endpoint:
        config["endpoint"] = str(endpoint) if path_style else _hosted(str(endpoint), address.bucket)
    provider = _s3_credentials(address, config)

    def make(retries: int) -> ObjectStore:
        return S3Store(
            address.bucket,
            config=config,
            client_options=_plain_http(client, endpoint),
            retry_config=_retries(address, retries),
            credential_provider=provider,
        )

    return make


def _hosted(endpoint: str, bucket: str) -> str:
    parts = urlsplit(endpoint)
    return (
        endpoint
        if parts.netloc.startswith(f"{bucket}.")
        else urlunsplit(parts._replace(netloc=f"{bucket}.{parts.netloc}"))
    )


def _s3_credentials(address: RemoteAddress, config: Any) -> Any:
    """boto3's chain as what obstore asks for keys; None leaves it to obstore. Fills in the profile's region."""
    if address.options.get("anonymous"):
        config["skip_signature"] = True
        return None
    profile = address.options.get("profile")
    if importlib.util.find_spec("boto3") is None:
        if profile:
            raise InvalidRequest(f"the profile {profile!r} is read by boto3, which is not installed: pip install boto3")
        return None
    import boto3
    from botocore.exceptions import BotoCoreError, ProfileNotFound
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session(profile_name=profile)
        if session.get_credentials() is None:
            raise RemoteDenied(
                f"no credentials for {address.url}: set a profile (aws configure, aws sso login) or AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, or give the option anonymous=true for a bucket that everybody may read"
            )
    except ProfileNotFound:
        raise RemoteDenied(f"there is no profile {profile!r}, which {address.url} takes its credentials from") from None
    except BotoCoreError as error:  # its text may hold what a program of the user's said
        raise RemoteDenied(f"the credentials for {address.url} cannot be had: {type(error).__name__}") from None
    if session.region_name and "region" not in config:
        config["region"] = session.region_name
    return Boto3CredentialProvider(session, ttl=KEYS_LAST)


def _azure(address: RemoteAddress, client: Mapping[str, Any]) -> Callable[[int], ObjectStore]:
    from obstore.store import AzureStore

    config: Any = settings(address, {"account": "account_name", "endpoint": "endpoint", "anonymous": "skip_signature"})

    def make(retries: int) -> ObjectStore:
        return AzureStore(
            address.bucket,
            config=config,
            client_options=_plain_http(client, config.get("endpoint")),
            retry_config=_retries(address, retries),
        )

    return make


def _google(address: RemoteAddress, client: Mapping[str, Any]) -> Callable[[int], ObjectStore]:
    from obstore.store import GCSStore

    config: Any = settings(address, {"endpoint": "base_url", "anonymous": "skip_signature"})

    def make(retries: int) -> ObjectStore:
        return GCSStore(
            address.bucket,
            config=config,
            client_options=_plain_http(client, config.get("base_url")),
            retry_config=_retries(address, retries),
        )

    return make


MAKERS: Mapping[str, Maker] = {"s3": _s3, "az": _azure, "gs": _google}


def _client(address: RemoteAddress) -> dict[str, Any]:
    """A request may take long if bytes keep coming: uploads and downloads are large, and lines slow."""
    wait = timeout_s(address)
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(wait, 10)),
        "read_timeout": timedelta(seconds=wait),
        "timeout": timedelta(seconds=20 * wait),
    }
    if ca_file := address.options.get("ca_file"):
        options["root_certificate"] = _certificate(Path(str(ca_file)).expanduser())
    return options


def _certificate(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"ca_file {path} cannot be read: {error.strerror}") from None
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise InvalidRequest(f"ca_file {path} holds no certificate in PEM form")
    return data


def _plain_http(client: Mapping[str, Any], endpoint: object) -> Any:
    return {**client, "allow_http": urlsplit(str(endpoint or "")).scheme == "http"}


def _retries(address: RemoteAddress, number: int) -> Any:
    """obstore's own retries; its waits double and are jittered as ours are."""
    backoff = {
        "init_backoff": timedelta(seconds=FIRST_WAIT_S),
        "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
        "base": 2,
    }
    return {
        "max_retries": number,
        "retry_timeout": timedelta(seconds=PATIENCE * timeout_s(address)),
        "backoff": backoff,
    }
