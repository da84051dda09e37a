"""The tier of another package that tests use: `tests/packages/distant`, found by its entry point.

Its packs are in the memory of the test's own process, and whoever reads or writes them does so over HTTP: an engine in
this process, a pool's worker, a worker of vLLM or SGLang. Processes that start while it is installed find it too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from thaw.data.locations import StoreMount, TierAddress

if TYPE_CHECKING:
    from distant.server import Vault

PACKAGE = Path(__file__).resolve().parent / "packages" / "distant"


@contextmanager
def installed() -> Iterator[Vault]:
    """The package on the path, here and in processes that begin meanwhile, and a server of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PACKAGE))
        before = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", f"{PACKAGE}{os.pathsep}{before}" if before else str(PACKAGE))
        from distant.server import Vault

        vault = Vault()
        try:
            yield vault
        finally:
            vault.close()


def mount_of(vault: Vault, *before: TierAddress, uuid: str = "7" * 32, **options: str | int | bool) -> StoreMount:
    """A store whose packs lie in `vault`, behind the tiers `before`."""
    return StoreMount(uuid=uuid, tiers=(*before, TierAddress(url=vault.url, options=options)))


def hasty(mount: StoreMount) -> StoreMount:
    """The same place, for whoever waits for no answer longer than a second: a silent server's client."""
    (last,) = mount.tiers
    return msgspec.structs.replace(mount, tiers=(TierAddress(url=last.url, options={"timeout_s": 1}),))
