"""What may be forked: everything that has KV, found where it is, and tokens that have none yet."""

from __future__ import annotations

import msgspec
import pytest

import thaw
from thaw.core.errors import CorruptBlob, InvalidRequest, NotFound, PolicyMismatch, Refused, StaleSession
from thaw.data.reader import read_header
from thaw.pool import Branch
from thaw.testing.laws.pool_kit import PoolFactory, PoolKit, bits


class PoolPointLaw(PoolKit):
    def test_a_session_that_is_decoding_is_forked_where_it_stands(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            session = self.trunk(pool)
            stream = session.stream("Go on.", self.sampled(self.many_tokens))
            for delta in stream:
                if delta.token_ids:
                    break
            results = pool.fork(session, [Branch(resume=True)], self.sampled(), replay=True)
            parent = stream.result()
            assert results[0].token_ids == parent.token_ids
            found, expected = results[0].trajectory, session.trajectory()
            assert msgspec.structs.replace(found, num_inherited_tokens=0) == expected
            assert len(expected.prompt_ids) < found.num_inherited_tokens and 0 < sum(found.own_mask) < sum(found.mask)

    def test_an_earlier_token_of_a_result_is_a_point(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            done = pool.fork(self.trunk(pool), ["Why?"], self.sampled())[0]
            assert done.session is not None
            at = done.session.num_tokens - self.num_tokens + 5
            again = pool.fork(done, [Branch(resume=True)], self.sampled(), at=at, replay=True)[0]
            assert again.token_ids == done.token_ids
            other = pool.fork(done, 2, self.sampled(), at=at)
            for result in (again, *other):
                t = result.trajectory
                assert t.completion_ids[:5] == done.token_ids[:5]
                assert (t.num_inherited_tokens, t.mask[:5], t.own_mask[:5]) == (at, (1,) * 5, (0,) * 5)
                assert t.own_mask[5:] == t.mask[5:] and result.session is not None and result.session.trajectory() == t
            assert pool.session(done, at=at).trajectory().own_mask == (0,) * 5
            with pytest.raises(NotFound, match="at="):
                pool.fork(done, 1, self.sampled(), at=10_000)

    def test_points_of_a_repository_go_by_their_names(self, pool_factory: PoolFactory, tmp_path: object) -> None:
        with thaw.init(f"{tmp_path}/runs") as repo, pool_factory(workers=1, repo=repo) as pool:
            trunk = self.trunk(pool)
            commit = trunk.commit("read it", branch="main").commit
            repo.tag("start", "main")
            trunk.append("More of it.")
            whole = pool.fork("main", 2, self.sampled())
            for name in ("start", commit, "main:turn=1", f"main:token={len(whole[0].trajectory.prompt_ids)}"):
                assert [r.token_ids for r in pool.fork(name, 2, self.sampled())] == [r.token_ids for r in whole], name
            assert pool.fork("main:token=100", 1, self.sampled())[0].trajectory.prompt_ids == trunk.tokens[:100]
            with pytest.raises(NotFound):
                pool.fork("nowhere", 1)

    def test_tokens_are_prefilled_once_and_what_is_stored_of_them_is_found(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            ids = list(self.trunk(pool).tokens)
            first = pool.fork(ids, 2, self.sampled(), seed=3, snapshot="before")[0]
            assert first.decision is not None
            assert (first.decision.action, first.decision.num_prefilled_tokens) == ("prefill", len(ids))
            again = pool.fork(ids, 2, self.sampled(), seed=3)[0]
            assert again.decision is not None and again.decision.action == "fork"
            assert again.token_ids == first.token_ids
            pool.snapshot(ids)
            longer = pool.fork([*ids, 65, 66, 67], 2, self.sampled())[0]
            assert longer.decision is not None and longer.decision.num_prefilled_tokens == 3
            assert longer.trajectory.prompt_ids == (*ids, 65, 66, 67)

    def test_a_point_that_is_none_is_refused_by_name(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            for wrong in (object(), 3.5, [], ["x"]):
                with pytest.raises(InvalidRequest):
                    pool.fork(wrong, 1)
            with pytest.raises(InvalidRequest, match="repo"):
                pool.fork("main", 1)
            with pytest.raises(InvalidRequest, match="empty"):
                pool.fork(pool.session(), 1)

    def test_no_kv_of_an_old_policy_is_served(self, pool_factory: PoolFactory, tmp_path: object) -> None:
        with thaw.init(f"{tmp_path}/runs") as repo, pool_factory(workers=2, repo=repo) as pool:
            trunk = self.trunk(pool)
            ids = list(trunk.tokens)
            trunk.commit("old", branch="main")
            old = pool.fork(ids, 2, self.sampled(), spread=2)
            snapshot = pool.snapshot(trunk)
            said = [(r.trajectory, r.session.turns, r.session.text) for r in old if r.session]
            pool.set_policy("1")
            assert pool.policy_version == "1"
            refused = {StaleSession: trunk, PolicyMismatch: snapshot, Refused: old[0]}
            for error, stale in (*refused.items(), (PolicyMismatch, "main")):
                with pytest.raises(error, match="policy"):
                    pool.fork(stale, 1, self.sampled())
            assert said == [(r.trajectory, r.session.turns, r.session.text) for r in old if r.session]
            assert all(r.session is not None and r.session.trajectory() == r.trajectory for r in old)
            assert list(trunk.trajectory().prompt_ids) == list(trunk.tokens) == ids
            new = pool.fork(ids, 2, self.sampled(), spread=2)
            assert sum(r.decision.num_prefilled_tokens for r in new if r.decision) >= len(ids)
            assert all(set(r.trajectory.policy_versions) == {"1"} for r in new)

    def test_damaged_bytes_in_the_arena_are_refused_and_not_served(self, pool_factory: PoolFactory) -> None:
        """The control: the same round without the damage is as the first."""
        with pool_factory(workers=2) as pool:
            trunk = self.trunk(pool)
            snapshot = pool.snapshot(trunk)
            first = pool.fork(trunk, 2, self.sampled())
            packs = list((pool._arena.store.packs).glob("*.safetensors"))
            blobs = [(entry, pack) for pack in packs for entry in read_header(pack).entries if not entry.is_object]
            _, pack = max(blobs, key=lambda pair: pair[0].nbytes)
            pool.drain(first[0].worker)
            data = pack.read_bytes()
            damaged_data = bytearray(data)
            for blob in (entry for entry, where in blobs if where == pack and not entry.is_pad):
                damaged_data[blob.offset] ^= 1
            pack.write_bytes(damaged_data)
            damaged = pool.fork(snapshot, 2, self.sampled(), errors="return")
            assert all(isinstance(result.error, CorruptBlob) for result in damaged)
            pack.write_bytes(data)
            assert bits(pool.fork(snapshot, 2, self.sampled())) == bits(first)

    def test_packs_over_the_limit_are_spilled_and_loaded_all_the_same(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            plain = pool.fork(trunk, 2, self.sampled())
        with pool_factory(workers=2, arena_nbytes=1) as pool:
            trunk = self.trunk(pool)
            snapshot = pool.snapshot(trunk)
            arena = pool.stats().arena
            assert arena.num_spills > 0 and arena.spilled_nbytes > 0 and arena.nbytes <= 1
            pool.drain(trunk.worker)
            loaded = pool.fork(snapshot, 2, self.sampled())
            assert bits(loaded) == bits(plain)
            assert loaded[0].decision is not None and loaded[0].decision.tier == "disk"

    def test_what_nobody_holds_leaves_the_arena(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            held = pool.snapshot(trunk)
            results = pool.fork(trunk, 4, self.sampled())
            snapshots = [pool.snapshot(result) for result in results]
            full = pool.stats().arena
            for snapshot in snapshots:
                snapshot.release()
            del snapshots, snapshot, results
            pool._arena.reclaim()
            left = pool.stats().arena
            assert left.num_points == 1 and left.nbytes < full.nbytes
            assert pool.fork(held, 1, self.sampled())[0].ok
