"""The fake backend: KV from hashes, logits from KV."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from thaw.core.errors import CorruptBlob, InvalidRequest
from thaw.core.identity import CacheGroup, ModelIdentity, tensor_leaf, weights_root
from thaw.core.ids import digest
from thaw.core.prefix import windows
from thaw.engines.embedded.backend import BOUNDARY_TOP, Backend, Feed, Sampled, SampleSpec
from thaw.engines.embedded.pages import PAGE, Extent, PagedKV
from thaw.engines.embedded.sampler import choose, largest, log_softmax
from thaw.engines.fake.codec import EOS, VOCAB, FakeCodec

LAYERS, HEADS, DIM = 2, 2, 4
ROW_NBYTES = 32
GROUP = CacheGroup(
    name="full", kind="full", first_layer=0, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype="uint8"
)
PLANES = LAYERS * 2
"""Planes of a page: layer × (K, V), each [token][head_dim]."""


class FakeExtent(Extent):
    """One bytearray: [head][page][layer][K|V][token][head_dim]."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._page_nbytes = PLANES * PAGE * DIM
        self._data = memoryview(bytearray(HEADS * num_pages * self._page_nbytes))

    def page(self, head: int, page: int) -> memoryview:
        start = (head * self.num_pages + page) * self._page_nbytes
        return self._data[start : start + self._page_nbytes]

    def gather(self, head: int, page: int, start: int, stop: int) -> memoryview:
        whole = self.page(head, page)
        return memoryview(b"".join(whole[(p * PAGE + start) * DIM : (p * PAGE + stop) * DIM] for p in range(PLANES)))

    def scatter(self, head: int, page: int, start: int, stop: int, data: memoryview, stored: int) -> None:
        whole, count = self.page(head, page), stop - start
        for p in range(PLANES):
            whole[(p * PAGE + start) * DIM : (p * PAGE + stop) * DIM] = data[
                p * stored * DIM : (p * stored + count) * DIM
            ]

    def copy_page(self, page: int, source: Extent, source_page: int, num_tokens: int) -> None:
        for head in range(HEADS):
            self.scatter(head, page, 0, num_tokens, source.gather(head, source_page, 0, num_tokens), num_tokens)


class FakeBackend(Backend):
    def __init__(self, model: str, seed: int, max_model_len: int, step_s: float) -> None:
        self.name, self.version, self.model, self.device = "fake", "1", model, "cpu"
        self.group, self.codec = GROUP, FakeCodec()
        self.max_model_len, self.vocab_size, self.eos_token_ids = max_model_len, VOCAB, (EOS,)
        self.numerics = {"hash": "blake2b"}
        self.weights = bytearray(struct.pack("<Q", seed))
        self.num_forwarded_tokens = 0
        self._step_s = step_s

    def extent(self, num_pages: int) -> FakeExtent:
        return FakeExtent(num_pages)

    def forward(self, feeds: Sequence[Feed]) -> list[bytes]:
        if self._step_s:
            time.sleep(self._step_s)
        return [self._run(feed) for feed in feeds]

    def _run(self, feed: Feed) -> bytes:
        kv = feed.kv
        for token in feed.tokens:
            self._write(kv, token)
            self.num_forwarded_tokens += 1
        read = hashlib.blake2b(bytes(self.weights), digest_size=ROW_NBYTES)
        for start, stop in windows(0, kv.num_tokens):
            for head in range(HEADS):
                read.update(kv.read(head, start, stop))
        return read.digest()

    def _write(self, kv: PagedKV, token: int) -> None:
        """The KV of one token: a hash of the token, its position and the KV before it."""
        position = kv.num_tokens
        made = hashlib.blake2b(
            bytes(self.weights) + struct.pack("<IQ", token, position), digest_size=HEADS * PLANES * DIM
        )
        if position:
            for head in range(HEADS):
                made.update(kv.read(head, position - 1, position))
        data = made.digest()
        for head in range(HEADS):
            piece = data[head * PLANES * DIM : (head + 1) * PLANES * DIM]
            kv.write(head, position, position + 1, memoryview(piece), 1)
        kv.num_tokens += 1

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
        return ModelIdentity(
            architecture="Fake",
            weights=weights_root({"seed": leaf}),
            config={"vocab_size": str(VOCAB), "max_model_len": str(self.max_model_len)},
            dtype="uint8",
            tokenizer=digest(b"bytes"),
            groups=(GROUP,),
        )

    def weights_of(self, source: str | Path) -> Callable[[], None]:
        """`source` is a seed."""
        try:
            weights = struct.pack("<Q", int(str(source)))
        except (ValueError, struct.error):
            raise InvalidRequest(f"the fake engine's weights are a seed, and {str(source)!r} is none") from None

        def put() -> None:
            self.weights[:] = weights

        return put

    def weights_sample(self) -> str:
        return digest(bytes(self.weights))


def _spread(row: bytes) -> list[float]:
    """A row's 258 logits in [-8, 8): printable bytes likelier, the end unlikely."""
    noise = hashlib.shake_128(row).digest(2 * VOCAB)
    values = [x / 4096.0 - 8.0 for x in struct.unpack(f"<{VOCAB}H", noise)]
    return [v + 6.0 if 97 <= i <= 122 or i == 32 else v - (9.0 if i >= 256 else 0.0) for i, v in enumerate(values)]
