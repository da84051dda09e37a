"""The tier: HEAD for a pack's size, GET for a range of it, PUT for a whole one. It checks nothing, and its errors are
Python's: what is read is verified above it, and what it raises becomes thaw's.

Options: `timeout_s`, `num_parallel`. `distant-read://` is the same place, only to be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection

from thaw.data.locations import TierAddress
from thaw.data.tiers.base import MissingPack, Requests


def open_tier(address: TierAddress) -> Distant:
    host, _, port = address.url.partition("://")[2].partition(":")
    options = {"timeout_s": 20, "num_parallel": 8, **address.options}
    return Distant(host, int(port), float(options["timeout_s"]), int(options["num_parallel"]))


def open_read_only(address: TierAddress) -> ReadOnly:
    return ReadOnly(open_tier(address))


class ReadOnly:
    def __init__(self, tier: Distant) -> None:
        self.open_pack = tier.open_pack


class Distant:
    def __init__(self, host: str, port: int, timeout_s: float, num_parallel: int) -> None:
        self.requests = Requests(nbytes=1 << 20, gap_nbytes=64 << 10, num_parallel=num_parallel)
        self._host, self._port, self._timeout_s = host, port, timeout_s

    def open_pack(self, name: str) -> DistantPack:
        status, found = self.ask("HEAD", name)
        if status == 404:
            raise MissingPack(f"pack {name} is not at distant://{self._host}:{self._port}")
        return DistantPack(self, name, int(found))

    @contextlib.contextmanager
    def new_pack(self, name: str) -> Iterator[Spool]:
        spool = Spool()
        yield spool
        status, _ = self.ask("PUT", name, body=bytes(spool.data))
        if status == 409:
            raise FileExistsError(17, "a pack of that name is there")

    def ask(
        self, verb: str, name: str, *, body: bytes | None = None, span: tuple[int, int] | None = None
    ) -> tuple[int, bytes]:
        """Status and body (of HEAD: the size)."""
        line = HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        with contextlib.closing(line):
            line.request(verb, f"/{name}", body, {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"})
            reply = line.getresponse()
            if reply.status >= 500:
                raise ConnectionError(f"{reply.status} {reply.reason}")
            size = reply.headers["Content-Length"].encode()
            return reply.status, size if verb == "HEAD" else reply.read()


class DistantPack:
    def __init__(self, tier: Distant, name: str, nbytes: int) -> None:
        self.nbytes, self.requests = nbytes, tier.requests
        self._tier, self._name = tier, name

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        total = sum(len(view) for view in views)
        _, data = self._tier.ask("GET", self._name, span=(offset, offset + total))
        at = 0
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)

    def close(self) -> None:
        return


class Spool:
    """A pack that grows in memory until it is put."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: memoryview, offset: int) -> None:
        end = offset + len(data)
        self.data.extend(bytes(max(0, end - len(self.data))))
        self.data[offset:end] = data

    def end(self, nbytes: int) -> None:
        del self.data[nbytes:]
