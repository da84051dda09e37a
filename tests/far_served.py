"""Laws of a served engine whose store has a tier of another package: its own workers write and read there, over HTTP,
found by the tier's entry point. A subclass gives `engine`, booted while the package is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

import distant_tier
from thaw.core.errors import CorruptBlob, StorageFailed
from thaw.data.pack import MissingPack
from thaw.engines.base import Engine
from thaw.testing.laws.kit import Lab, bits, greedy, ids, same, seeded
from thaw.testing.plans import halves_swapped, mount_at, tampered

if TYPE_CHECKING:
    from distant.server import Vault


class FarServed:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls) -> Iterator[Vault]:
        with distant_tier.installed() as vault:
            yield vault

    @pytest.fixture
    def vault(self, server: Vault) -> Vault:
        server.packs.clear()
        server.forget()
        return server

    def test_it_is_written_and_read_by_the_engines_own_workers(self, engine: Engine, vault: Vault) -> None:
        lab = Lab(distant_tier.mount_of(vault))
        session = lab.begin(engine, 400)
        captured = lab.capture(engine, session)
        assert {pack.name: pack.nbytes for pack in captured.packs} == {n: len(d) for n, d in vault.packs.items()}
        assert not vault.ranges
        plan = lab.plan(captured)
        hydrated = lab.hydrate(engine, plan)
        assert hydrated.proof.num_cached_tokens == plan.num_kv and hydrated.proof.verification == "disk-verified"
        assert {pack for pack, _, _ in vault.ranges} == set(vault.packs)
        right = lab.one(engine, lab.twin(engine, session), seeded(16), (5,))
        same(lab.one(engine, hydrated.session, seeded(16), (5,)), right)
        wrong = lab.hydrate(engine, tampered(plan, halves_swapped)).session
        assert bits(lab.one(engine, wrong, seeded(16), (5,)).logprobs) != bits(right.logprobs)

    def test_one_plan_reads_a_folder_and_the_tier_behind_it(self, engine: Engine, vault: Vault, tmp_path: Path) -> None:
        lab = Lab(mount_at(tmp_path / "packs"))
        session = lab.begin(engine, 300)
        first = lab.capture(engine, session)
        lab.one(engine, session, greedy(4), ids(200, 1))
        second = lab.capture(engine, session, base=first.num_kv)
        for pack in first.packs:
            vault.packs[pack.name] = (lab.packs / pack.name).read_bytes()
            (lab.packs / pack.name).unlink()
        plan = lab.plan(second, first)
        with pytest.raises(MissingPack, match=first.packs[0].name):
            lab.hydrate(engine, plan)
        both = msgspec.structs.replace(plan, mount=distant_tier.mount_of(vault, *plan.mount.tiers))
        vault.delay_s = 0.05
        hydrated = lab.hydrate(engine, both)
        assert {pack for pack, _, _ in vault.ranges} == {pack.name for pack in first.packs}
        right = lab.one(engine, lab.twin(engine, session), seeded(16), (5,))
        same(lab.one(engine, hydrated.session, seeded(16), (5,)), right)

    @pytest.mark.parametrize("fault", ["down", "cut", "silent", "flip"])
    def test_what_the_tier_does_wrong_costs_its_own_request(self, engine: Engine, vault: Vault, fault: str) -> None:
        lab = Lab(distant_tier.mount_of(vault))
        session = lab.begin(engine, 300)
        plan = lab.plan(lab.capture(engine, session))
        right = lab.one(engine, lab.twin(engine, session), seeded(8), (5,))
        vault.fault = fault
        wanted = (CorruptBlob, "hashes to") if fault == "flip" else (StorageFailed, vault.url)
        mount = distant_tier.hasty(plan.mount) if fault == "silent" else plan.mount
        with pytest.raises(wanted[0], match=wanted[1]):
            lab.hydrate(engine, msgspec.structs.replace(plan, mount=mount))
        same(lab.one(engine, lab.twin(engine, session), seeded(8), (5,)), right)
        vault.fault = "down"
        with pytest.raises(StorageFailed, match=f"cannot write {vault.url}"):
            lab.capture(engine, session)
        vault.fault = ""
        same(lab.one(engine, lab.hydrate(engine, plan).session, seeded(8), (5,)), right)
