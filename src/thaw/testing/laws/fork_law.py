"""Law 4 and 8: copy-on-write, and own session only."""

from __future__ import annotations

import itertools
import struct

import pytest

from thaw.core.cache import columns
from thaw.engines.base import Captured, Completion, Engine, SessionRef
from thaw.testing.laws.bytes_law import blob_ids, kv_nbytes, prefix_bytes
from thaw.testing.laws.kit import (
    LIMIT_S,
    LONGER_AND_LONGER,
    EngineKit,
    Lab,
    greedy,
    ids,
    kv_complete,
    same,
    seeded,
    wait_for,
)

SLACK_NBYTES = 64 * 1024
"""What a pack of a few hundred tokens may hold beside KV: its header, padding, a hidden state."""
BLOB_NBYTES = 320
"""And for each blob: its line in the header, and what aligns it."""


class ForkLaw(EngineKit):
    def test_the_parent_is_untouched_by_what_its_children_do(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        twin = lab.twin(engine, session)
        before, view = lab.capture(engine, session), engine.view(session)
        lab.run(engine, *lab.fork(engine, session, 3), sampling=seeded(12), prompt=ids(20, 9))
        lab.run(engine, *lab.fork(engine, session, 2, at=280), sampling=seeded(12), prompt=ids(40, 9))
        after = lab.capture(engine, session)
        assert blob_ids(before) == blob_ids(after) and before.boundary == after.boundary
        assert engine.view(session) == view
        same(lab.one(engine, session, greedy(8)), lab.one(engine, twin, greedy(8)))

    def test_siblings_are_untouched_by_one_another(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        first, second, third = (lab.twin(engine, session) for _ in range(3))
        expected = lab.one(engine, first, seeded(12), (1,))
        lab.one(engine, second, seeded(12), ids(30, 6))
        same(expected, lab.one(engine, third, seeded(12), (1,)))

    def test_siblings_that_take_turns_are_untouched_by_one_another(self, engine: Engine, lab: Lab) -> None:
        """A sibling goes on after another one ran: what it had must still be there."""
        session = lab.begin(engine, 300)
        first, second, third = (lab.twin(engine, session) for _ in range(3))
        expected = [lab.one(engine, first, seeded(6), (1,)) for _ in range(2)]
        for turn in expected:
            same(turn, lab.one(engine, third, seeded(6), (1,)))
            lab.one(engine, second, seeded(6), (2, 3))

    def test_in_one_batch_each_session_goes_on_from_its_own_document(self, engine: Engine, lab: Lab) -> None:
        """Documents of one length, each beside either of the others: no row of a batch reads another's blocks. A row
        is compared with the same row: where three ranks add up, bits depend on which row it is."""
        documents = [lab.begin(engine, 600, start=start) for start in (0, 5, 9)]

        def beside(first: int, second: int) -> list[Completion]:
            return lab.run(engine, *(lab.twin(engine, documents[i]) for i in (first, second)), sampling=seeded(8))

        pairs = {(a, b): beside(a, b) for a, b in itertools.permutations(range(3), 2)}
        for one, (two, three) in enumerate(((1, 2), (0, 2), (0, 1))):
            same(pairs[one, two][0], pairs[one, three][0])
            same(pairs[two, one][1], pairs[three, one][1])
        assert len({pairs[pair][0].logprobs for pair in ((0, 1), (1, 0), (2, 0))}) == 3

    def test_children_are_untouched_by_what_the_parent_does(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        early, late = lab.twin(engine, session), lab.twin(engine, session)
        expected = lab.one(engine, early, seeded(12), (1,))
        lab.one(engine, session, seeded(12), ids(300, 6))
        engine.close_session(session)
        same(expected, lab.one(engine, late, seeded(12), (1,)))

    def test_a_running_session_forks_without_stopping(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 100)
        for count in LONGER_AND_LONGER:
            expected = lab.one(engine, lab.twin(engine, session), seeded(count))
            parent = lab.twin(engine, session)
            handle = lab.start(engine, parent, sampling=seeded(count))
            wait_for(handle, 4)
            child = lab.twin(engine, parent)
            cut = len(engine.view(child).tokens) - 100
            same(expected, handle.result(LIMIT_S)[0])
            if cut < count:
                break
        assert 4 <= cut < count
        same(expected, lab.resume(engine, child)[0])

    def test_a_fork_of_a_fork_remembers(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 40)
        child = lab.fork(engine, session)[0]
        lab.one(engine, child, seeded(6))
        grandchild = lab.fork(engine, child)[0]
        assert engine.view(grandchild).tokens == engine.view(child).tokens
        assert engine.view(grandchild).turns == engine.view(child).turns
        assert engine.view(grandchild).salt == engine.view(session).salt

    @pytest.mark.parametrize("decodes", [False, True], ids=["idle", "decoding"])
    def test_a_snapshot_holds_nothing_of_other_sessions(self, engine: Engine, lab: Lab, decodes: bool) -> None:
        """Eight other sessions decode while one is captured, which is idle or decodes with them: none of their tokens,
        none of their bytes are in it."""
        mine, others, before, captured = self._captured_beside_eight(engine, lab, decodes)
        after = lab.capture(engine, mine)
        assert captured.tokens == after.tokens[: len(captured.tokens)] and captured.tokens[:300] == ids(300)
        if decodes:
            assert len(captured.tokens) > 300 and captured.num_kv >= len(captured.tokens) - 1
        else:
            assert len(captured.tokens) == 300 and blob_ids(captured) == blob_ids(before)
            assert kv_complete(engine, captured.num_kv, 300)
        assert prefix_bytes(lab, captured, captured.num_kv) == prefix_bytes(lab, after, captured.num_kv)
        pack = b"".join((lab.packs / written.name).read_bytes() for written in captured.packs)
        assert 0 <= len(pack) - kv_nbytes(captured) <= SLACK_NBYTES + BLOB_NBYTES * len(captured.blobs)
        assert _runs(lab, captured)[0] in pack, "the search itself must be able to find KV"
        for session in others:
            foreign = lab.capture(engine, session)
            assert len(foreign.tokens) >= 278, "it must have generated what is searched for"
            assert set(blob_ids(foreign)).isdisjoint(blob_ids(captured))
            assert not any(run in pack for run in _runs(lab, foreign))
            assert not any(run in pack for at in (100, 270) for run in _token_runs(foreign.tokens[at:]))

    def _captured_beside_eight(
        self, engine: Engine, lab: Lab, decodes: bool
    ) -> tuple[SessionRef, list[SessionRef], Captured, Captured]:
        """A session and the eight, all of which decode until after it was captured; that capture, and one from before.
        Where the engine was done with one of them first, once more."""
        for _ in range(5):
            mine = lab.begin(engine, 300)
            before = lab.capture(engine, mine)
            others = [lab.begin(engine, 270, start=20 + i, seed=i) for i in range(8)]
            running = [mine, *others] if decodes else others
            handle = lab.start(engine, *running, sampling=seeded(self.long_answer))
            wait_for(handle, 20 * len(running))
            captured = lab.capture(engine, mine)
            amid = not handle.done() and all(engine.view(session).running for session in running)
            handle.cancel()
            ended = {out.finish_reason for out in handle.result(LIMIT_S)}
            if amid and ended == {"abort"}:
                return mine, others, before, captured
            for session in (mine, *others):
                engine.close_session(session)
        raise AssertionError("one of the answers was whole each time before the session was captured")

    @pytest.mark.parametrize("salt", ["own", "same"])
    def test_a_fork_of_a_session_in_an_engine_that_prefilled_the_same_prompt_itself(
        self, engine: Engine, other: Engine, lab: Lab, salt: str
    ) -> None:
        """The same tokens, read in pieces, have other bits. What was captured continues with its own."""
        session = lab.begin(engine, 700)
        captured = lab.capture(engine, session)
        local = other.open(seed=1, salt=captured.salt if salt == "same" else None)
        for start, stop in itertools.pairwise((0, 90, 300, 301, 560, 700)):
            other.append(local, ids(700)[start:stop]).result(LIMIT_S)
        restored = lab.hydrate(other, lab.plan(captured)).session
        early, late = lab.twin(other, restored), lab.twin(other, restored)
        expected = lab.one(engine, lab.twin(engine, session), seeded(16), (3, 1))
        same(expected, lab.one(other, early, seeded(16), (3, 1)))
        same(lab.one(engine, session, seeded(16)), lab.one(other, restored, seeded(16)))
        lab.one(other, local, seeded(16), (3, 1))
        same(expected, lab.one(other, late, seeded(16), (3, 1)))

    def test_session_names_and_salts_cannot_be_guessed(self, engine: Engine) -> None:
        names = [engine.open() for _ in range(16)]
        salts = {engine.view(name).salt for name in names}
        assert len(set(names)) == len(salts) == 16
        assert min(map(len, names)) >= 22 and min(map(len, salts)) >= 22


def _runs(lab: Lab, captured: Captured) -> list[bytes]:
    """Pieces of every blob, four tokens long at least: one token's values may be the same in two sessions."""
    where = {x.blob: x for x in captured.blobs}
    out = []
    for group, number in columns(captured.identity.groups):
        size = max(64, 4 * group.planes[0])
        for segment in captured.segments:
            data = lab.read(where[segment.blobs[group.name][number]])
            out += [data[i : i + size] for i in range(0, len(data) - size, max(size, len(data) // 8))]
    return out


def _token_runs(tokens: tuple[int, ...]) -> list[bytes]:
    """The first eight tokens, as 32-bit and 64-bit numbers and as JSON."""
    eight = tokens[:8]
    return [struct.pack("<8I", *eight), struct.pack("<8Q", *eight), ",".join(map(str, eight)).encode()]
