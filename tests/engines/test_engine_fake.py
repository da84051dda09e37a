"""The law book on `fake`, and on a `fake` that has none of the capabilities that an engine may lack."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine, SessionRef
from thaw.engines.embedded import generation
from thaw.engines.embedded.backend import Feed
from thaw.engines.embedded.engine import CAPABILITIES, EmbeddedEngine
from thaw.engines.embedded.pages import PagedKV
from thaw.engines.embedded.session import LiveSession
from thaw.engines.embedded.weights import WeightsWatch
from thaw.engines.fake.backend import ROW_NBYTES, FakeBackend
from thaw.testing import EngineTests
from thaw.testing.laws.kit import Lab, Load

OPTIONAL = {"boundary", "boundary-hidden", "own-batch", "prefill-progress"}


class TestFake(EngineTests):
    changes_weights = True

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls) -> Load:
        return lambda **changes: load_engine("fake", **changes)

    def change_weights(self, engine: Engine) -> None:
        engine._backend.weights[0] ^= 0x55  # type: ignore[attr-defined]

    def own_weights(self, engine: Engine) -> str:
        return "0"

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(WeightsWatch, "_look", lambda self: None)


class MixedBackend(FakeBackend):
    """Numbers as continuous batching makes them: KV and logits depend on all that runs in the same step."""

    shape = b""

    def forward(self, feeds: Sequence[Feed]) -> list[bytes]:
        self.shape = repr((self.num_running(), [len(feed.tokens) for feed in feeds])).encode()
        return [hashlib.blake2b(row + self.shape, digest_size=ROW_NBYTES).digest() for row in super().forward(feeds)]

    def _write(self, kv: PagedKV, token: int) -> None:
        super()._write(kv, token)
        noise = hashlib.blake2b(self.shape, digest_size=1).digest()[0]
        for column in range(len(self._columns)):
            data = bytes(byte ^ noise for byte in bytes(kv.read(column, kv.num_tokens - 1, kv.num_tokens)))
            kv.write(column, kv.num_tokens - 1, kv.num_tokens, memoryview(data), 1)

    def num_running(self) -> int:
        return 1


class PlainEngine(EmbeddedEngine):
    """Keeps no logits and no hidden state: whoever goes on at a prompt's end runs its last token again."""

    def __init__(self, *, max_model_len: int = 32768, policy: str = "0") -> None:
        backend = MixedBackend("fake", 0, max_model_len, 0.0)
        super().__init__(backend, policy=policy)
        backend.num_running = lambda: 1 + len(self._driver._tasks)  # type: ignore[method-assign]
        self.info = msgspec.structs.replace(self.info, capabilities=CAPABILITIES - OPTIONAL)

    def _release(self, session: LiveSession) -> None:
        super()._release(session)
        session.row = session.last = None
        if session.kv.num_tokens == len(session.tokens) > 0:
            session.kv = session.kv.fork(len(session.tokens) - 1)

    def _fresh(self, ref: SessionRef) -> LiveSession:
        live = super()._fresh(ref)
        live.last = None
        return live


class TestPlain(TestFake):
    """That the laws' other halves can be kept, hang nowhere, and ask for no equality across shapes of batches."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def one_chunk(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "CHUNK", 1 << 20)
            patch.setattr(generation, "PACK", 1 << 20)
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls) -> Load:
        return PlainEngine

    @pytest.mark.slow("without a batch, looking for a seed whose turn ends takes long")
    def test_the_end_token_ends_the_turn_unless_ignored(self, engine: Engine, lab: Lab) -> None:
        super().test_the_end_token_ends_the_turn_unless_ignored(engine, lab)
