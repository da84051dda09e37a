"""The fake backend: KV from hashes, logits from KV."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from msgspec import UNSET

from thaw.core.cache import CacheGroup, FullKV, columns, point_groups
from thaw.core.errors import CorruptBlob, InvalidRequest
from thaw.core.identity import ModelIdentity, identity_of, tensor_leaf, weights_root
from thaw.core.ids import digest
from thaw.core.prefix import windows
from thaw.engines.embedded.backend import BOUNDARY_TOP, Backend, Feed
from thaw.engines.embedded.pages import PAGE, Extent, PagedKV
from thaw.engines.fake.codec import EOS, VOCAB, FakeCodec
from thaw.engines.sampling.sampler import choose, largest, log_softmax
from thaw.engines.sampling.spec import Sampled, SampleSpec

ROW_NBYTES = 32
ONE_GROUP = (FullKV(name="full", first_layer=0, num_layers=2, num_kv_heads=2, head_dim=4, dtype="uint8"),)


class FakeExtent(Extent):
    """One bytearray a column: [page][plane][token][bytes]."""

    def __init__(self, groups: Sequence[CacheGroup], num_pages: int) -> None:
        self.num_pages = num_pages
        self._planes = [column.group.planes for column in columns(groups)]
        self._data = [memoryview(bytearray(num_pages * PAGE * sum(planes))) for planes in self._planes]

    def page(self, column: int, page: int) -> memoryview:
        nbytes = PAGE * sum(self._planes[column])
        return self._data[column][page * nbytes : (page + 1) * nbytes]

    def gather(self, column: int, page: int, start: int, stop: int) -> memoryview:
        whole, out, at = self.page(column, page), [], 0
        for width in self._planes[column]:
            out.append(whole[at + start * width : at + stop * width])
            at += PAGE * width
        return memoryview(b"".join(out))

    def scatter(self, column: int, page: int, start: int, stop: int, data: memoryview, stored: int) -> None:
        whole, at, begin, count = self.page(column, page), 0, 0, stop - start
        for width in self._planes[column]:
            whole[at + start * width : at + stop * width] = data[begin : begin + count * width]
            at += PAGE * width
            begin += stored * width

    def copy_page(self, page: int, source: Extent, source_page: int, num_tokens: int) -> None:
        for column in range(len(self._planes)):
            data = source.gather(column, source_page, 0, num_tokens)
            self.scatter(column, page, 0, num_tokens, data, num_tokens)


class FakeBackend(Backend):
    def __init__(
        self,
        model: str,
        seed: int,
        max_model_len: int,
        step_s: float,
        groups: Sequence[CacheGroup] = ONE_GROUP,
        *,
        keeps_interior: bool = True,
    ) -> None:
        self.name, self.version, self.model, self.device = "fake", "1", model, "cpu"
        self.groups, self.codec = tuple(groups), FakeCodec()
        self.keeps_interior = keeps_interior
        self.max_model_len, self.vocab_size, self.eos_token_ids = max_model_len, VOCAB, (EOS,)
        self.numerics = {"hash": "blake2b"}
        self.weights = bytearray(struct.pack("<Q", seed))
        self._source = self._away = bytes(self.weights)
        self.num_forwarded_tokens = 0
        self._step_s = step_s
        self._columns = columns(self.groups)
        windows_of = [getattr(column.group, "window", UNSET) for column in self._columns]
        self._reach = [max_model_len if window is UNSET else window for window in windows_of]
        self._states = [nbytes for group in point_groups(self.groups) for _, nbytes in group.blobs]

    def extent(self, num_pages: int) -> FakeExtent:
        return FakeExtent(self.groups, num_pages)

    def forward(self, feeds: Sequence[Feed]) -> list[bytes]:
        if self._step_s:
            time.sleep(self._step_s)
        return [self._run(feed) for feed in feeds]

    def _run(self, feed: Feed) -> bytes:
        """A row: the hash of all that the last token attends to, itself among it, and of the states after it."""
        kv = feed.kv
        for token in feed.tokens:
            self._write(kv, token)
            self.num_forwarded_tokens += 1
        read = hashlib.blake2b(bytes(self.weights), digest_size=ROW_NBYTES)
        for start, stop in windows(0, kv.num_tokens):
            for index, reach in enumerate(self._reach):
                first = max(start, kv.num_tokens - reach)
                if first < stop:
                    read.update(kv.read(index, first, stop))
        for data in kv.points.get(kv.num_tokens, ()):
            read.update(bytes(data))
        return read.digest()

    def _write(self, kv: PagedKV, token: int) -> None:
        """The KV of one token and the states after it: hashes of the token, its position, and what was before it."""
        position = kv.num_tokens
        sizes = [column.group.token_nbytes_per_blob for column in self._columns]
        made = _Maker(bytes(self.weights) + struct.pack("<IQ", token, position))
        if position:
            for index in range(len(self._columns)):
                made.update(kv.read(index, position - 1, position))
            for state in kv.points.get(position, ()):
                made.update(bytes(state))
        data, at = made.digest(sum(sizes) + sum(self._states)), 0
        for index, size in enumerate(sizes):
            kv.write(index, position, position + 1, memoryview(data)[at : at + size], 1)
            at += size
        kv.num_tokens += 1
        if self._states:
            kv.keep(_parted(data[at:], self._states))

    def logits(self, rows: Sequence[bytes]) -> list[list[float]]:
        return [_spread(row) for row in rows]

    def sample(self, logits: list[list[float]], specs: Sequence[SampleSpec]) -> list[Sampled]:
        return [choose(row, spec) for row, spec in zip(logits, specs, strict=True)]

    def boundary(self, logits: list[list[float]], index: int) -> tuple[str, tuple[tuple[int, float], ...]]:
        row = logits[index]
        return digest(struct.pack(f"<{len(row)}f", *row)), largest(log_softmax(row), BOUNDARY_TOP)

    def row_bytes(self, row: bytes) -> tuple[bytes, str, tuple[int, ...]]:
        return row, "uint8", (len(row),)

    def row_from(self, data: bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
        if (dtype, shape, len(data)) != ("uint8", (ROW_NBYTES,), ROW_NBYTES):
            raise CorruptBlob(f"the stored hidden state is {dtype} {list(shape)}; expected uint8 [{ROW_NBYTES}]")
        return data

    def identity(self) -> ModelIdentity:
        leaf = tensor_leaf("seed", "U8", (8,), self.weights)
        return identity_of(
            architecture="Fake",
            weights=weights_root({"seed": leaf}),
            config={"vocab_size": str(VOCAB), "max_model_len": str(self.max_model_len)},
            dtype="uint8",
            tokenizer=digest(b"bytes"),
            groups=self.groups,
        )

    def weights_of(self, source: str | Path) -> Callable[[], None]:
        """`source` is a seed."""
        try:
            weights = struct.pack("<Q", int(str(source)))
        except (ValueError, struct.error):
            raise InvalidRequest(f"the fake engine's weights are a seed, and {str(source)!r} is none") from None

        def put() -> None:
            self.weights[:] = self._source = weights

        return put

    def require_sleep(self, level: int) -> None:
        """It can."""

    def sleep(self, level: int) -> None:
        """Level 2 reads them again from the seed: what was written into them since is gone."""
        self._away = bytes(self.weights) if level == 1 else self._source
        self.weights[:] = bytes(len(self.weights))

    def wake(self) -> None:
        self.weights[:] = self._away

    def weights_sample(self) -> str:
        return digest(bytes(self.weights))


def _spread(row: bytes) -> list[float]:
    """A row's 258 logits in [-8, 8): printable bytes likelier, the end unlikely."""
    noise = hashlib.shake_128(row).digest(2 * VOCAB)
    values = [x / 4096.0 - 8.0 for x in struct.unpack(f"<{VOCAB}H", noise)]
    return [v + 6.0 if 97 <= i <= 122 or i == 32 else v - (9.0 if i >= 256 else 0.0) for i, v in enumerate(values)]


class _Maker:
    """A hash of any length: of up to 64 bytes BLAKE2b, which the KV of the one group always was; else SHAKE-128."""

    def __init__(self, data: bytes) -> None:
        self._data = [data]

    def update(self, data: bytes | memoryview) -> None:
        self._data.append(bytes(data))

    def digest(self, nbytes: int) -> bytes:
        data = b"".join(self._data)
        if nbytes <= hashlib.blake2b.MAX_DIGEST_SIZE:
            return hashlib.blake2b(data, digest_size=nbytes).digest()
        return hashlib.shake_128(data).digest(nbytes)


def _parted(data: bytes, sizes: Sequence[int]) -> tuple[bytes, ...]:
    ends = list(accumulate(sizes))
    return tuple(data[end - size : end] for end, size in zip(ends, sizes, strict=True))
