"""A remote that is open: its bucket, and the part of it that a namespace sees."""

from __future__ import annotations

from typing import NamedTuple

from thaw.remote.bucket import Bucket
from thaw.remote.layout import NamespaceBucket
from thaw.remote.settings import RemoteSettings


class OpenedRemote(NamedTuple):
    """`whole`: all of the remote; `bucket`: the namespace's own part."""

    name: str
    url: str
    whole: Bucket
    bucket: NamespaceBucket


def opened(name: str, settings: RemoteSettings, namespace: str) -> OpenedRemote:
    """Nothing is asked of the network yet. Raises `InvalidRequest`, `NotFound` where its package is missing."""
    from thaw.remote.address import open_bucket, parse

    address = parse(settings.url, settings.options)
    return over(name, address.url, open_bucket(address), namespace)


def over(name: str, url: str, bucket: Bucket, namespace: str) -> OpenedRemote:
    return OpenedRemote(name, url, bucket, NamespaceBucket(bucket, namespace))
