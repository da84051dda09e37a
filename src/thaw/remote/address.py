"""From a URL and options to the bucket that they name. What they may be: `thaw.remote.location`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thaw.remote.location import RemoteAddress, parse

if TYPE_CHECKING:
    from thaw.remote.bucket import Bucket

__all__ = ["RemoteAddress", "open_bucket", "parse"]


def open_bucket(address: RemoteAddress) -> Bucket:
    """Opens no connection yet, but looks for credentials.

    Raises `Unsupported` where obstore is not installed, `InvalidRequest` where an option does not fit, `RemoteDenied`
    without credentials.
    """
    if address.scheme == "file":
        from thaw.remote.folder import FolderBucket

        return FolderBucket(Path(address.prefix))
    from thaw.remote.stores import MAKERS, obstore_bucket

    return obstore_bucket(address, MAKERS[address.scheme])
