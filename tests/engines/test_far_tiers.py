"""Sessions whose packs lie in a tier of another package, behind HTTP, are exact: captured there, and hydrated while the
bytes come in. In engines of this process, and in a worker of a pool, which is another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

import distant_tier
from thaw.core.errors import CorruptBlob, StorageFailed
from thaw.data.locations import StoreMount
from thaw.data.pack import MissingPack
from thaw.engines import load_engine
from thaw.engines.base import Engine, HydratePlan
from thaw.pool import ForkPool
from thaw.testing.laws.bytes_law import BytesLaw
from thaw.testing.laws.groups_law import GroupsLaw
from thaw.testing.laws.kit import LIMIT_S, Lab, Load, bits, greedy, ids, same, seeded
from thaw.testing.plans import halves_swapped, mount_at, tampered

if TYPE_CHECKING:
    from distant.server import Vault

IN_FOLDERS = ("test_a_damaged_blob_is_refused_by_name", "test_a_cut_off_or_missing_pack_is_refused")
"""Laws that damage the files of a folder; what they say of a tier is said here."""


@pytest.fixture(scope="module")
def server() -> Iterator[Vault]:
    with distant_tier.installed() as vault:
        yield vault


@pytest.fixture
def vault(server: Vault) -> Vault:
    server.packs.clear()
    server.forget()
    return server


class FarGroups(GroupsLaw):
    """Over a mount whose only tier is the vault."""

    @pytest.fixture
    def mount(self, vault: Vault) -> StoreMount:
        return distant_tier.mount_of(vault)


class FarLaws(FarGroups, BytesLaw):
    @pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
    def test_a_damaged_blob_is_refused_by_name(  # type: ignore[override]
        self, engine: Engine, other: Engine, lab: Lab, vault: Vault, damage: str
    ) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 300)))
        lab.hydrate(other, plan)
        victim = plan.slices[-1].blobs[plan.identity.groups[0].name][-1]
        data = vault.packs[victim.pack]
        if damage == "flip":
            at = victim.offset + victim.nbytes - 1
            vault.packs[victim.pack] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        elif damage == "cut":
            vault.packs[victim.pack] = data[: victim.offset]
        else:
            del vault.packs[victim.pack]
        error, words = {
            "flip": (CorruptBlob, victim.blob), "cut": (CorruptBlob, "cut off"), "gone": (MissingPack, victim.pack)
        }[damage]  # fmt: skip
        with pytest.raises(error, match=words):
            lab.hydrate(other, plan)

    @pytest.mark.parametrize("fault", ["down", "cut", "short", "silent"])
    def test_a_cut_off_or_missing_pack_is_refused(  # type: ignore[override]
        self, engine: Engine, other: Engine, lab: Lab, vault: Vault, fault: str
    ) -> None:
        """A tier that fails: thaw's error with its address, and once it is well again the same plan is exact."""
        session = lab.begin(engine, 300)
        plan = lab.plan(lab.capture(engine, session))
        mount = distant_tier.hasty(plan.mount) if fault == "silent" else plan.mount
        vault.fault = fault
        with pytest.raises(StorageFailed, match=vault.url):
            lab.hydrate(other, msgspec.structs.replace(plan, mount=mount))
        vault.fault = ""
        expected = lab.one(engine, session, greedy(4), (5, 6))
        found = lab.one(other, lab.hydrate(other, plan).session, greedy(4), (5, 6))
        assert bits(found.logprobs) == bits(expected.logprobs)


class TestFake(FarLaws):
    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls) -> Load:
        return lambda **changes: load_engine("fake", **changes)


class TestFakeHybrid(FarGroups):
    """A full and a sliding group and point states, which it keeps at the end of a session alone."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls) -> Load:
        return lambda **changes: load_engine("fake", groups="hybrid", interior=False, **changes)


class TestTransformers(FarLaws):
    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Load:
        pytest.importorskip("torch")
        folder = str(tiny_model("llama"))
        return lambda **changes: load_engine("transformers", model=folder, **changes)


# -- one plan over several tiers


def moved(plan: HydratePlan, lab: Lab, vault: Vault, packs: set[str]) -> HydratePlan:
    """`plan`, with these of its packs in the vault and no longer in the folder."""
    for pack in packs:
        vault.packs[pack] = (lab.packs / pack).read_bytes()
        (lab.packs / pack).unlink()
    return msgspec.structs.replace(plan, mount=distant_tier.mount_of(vault, *plan.mount.tiers))


@pytest.fixture(scope="module", params=["fake", "transformers"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    options: dict[str, object] = {}
    if request.param == "transformers":
        pytest.importorskip("torch")
        tiny_model: Callable[..., Path] = request.getfixturevalue("tiny_model")
        options = {"model": str(tiny_model("llama"))}
    with load_engine(request.param, **options) as loaded:
        yield loaded


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


@pytest.mark.parametrize("far", ["first", "second", "both"])
def test_a_session_hydrates_from_a_folder_and_while_the_rest_comes_in(
    engine: Engine, lab: Lab, vault: Vault, far: str
) -> None:
    session = lab.begin(engine, 400)
    captures = [lab.capture(engine, session)]
    lab.one(engine, session, greedy(4), ids(300, 1))
    captures.append(lab.capture(engine, session, base=captures[0].num_kv))
    names = [{pack.name for pack in captured.packs} for captured in captures]
    chosen = {"first": names[0], "second": names[1], "both": names[0] | names[1]}[far]
    plan = moved(lab.plan(captures[1], captures[0]), lab, vault, chosen)
    vault.delay_s = 0.05
    hydrated = lab.hydrate(engine, plan)
    assert hydrated.proof.num_cached_tokens == plan.num_kv and hydrated.proof.verification == "disk-verified"
    assert {pack for pack, _, _ in vault.ranges} == chosen
    right = lab.one(engine, lab.twin(engine, session), seeded(16), (5,))
    same(lab.one(engine, hydrated.session, seeded(16), (5,)), right)
    for piece in (0, -1):
        wrong = tampered(plan, halves_swapped, piece=piece % len(plan.slices))
        found = lab.one(engine, lab.hydrate(engine, wrong).session, seeded(16), (5,))
        assert bits(found.logprobs) != bits(right.logprobs), "the control: other bytes would have shown"


def test_other_sessions_go_on_while_a_far_one_comes_in(engine: Engine, lab: Lab, vault: Vault) -> None:
    session = lab.begin(engine, 300)
    captured = lab.capture(engine, session)
    plan = moved(lab.plan(captured), lab, vault, {pack.name for pack in captured.packs})
    vault.delay_s = 1.0
    coming = engine.hydrate(plan)
    out = lab.one(engine, session, greedy(2), (5,))
    assert len(out.token_ids) == 2 and not coming.done()
    assert coming.result(LIMIT_S).proof.num_cached_tokens == plan.num_kv


def test_a_pools_worker_reads_and_writes_such_a_tier_in_its_own_process(vault: Vault) -> None:
    with ForkPool("fake", workers=2) as pool:
        one, two = [life.engine for _, life in pool._fleet.ready()]
        lab = Lab(distant_tier.mount_of(vault))
        session = lab.begin(one, 400)
        captured = lab.capture(one, session)
        assert {pack.name for pack in captured.packs} == set(vault.packs)
        plan = lab.plan(captured)
        right = lab.one(one, session, seeded(12), (5,))
        same(lab.one(two, lab.hydrate(two, plan).session, seeded(12), (5,)), right)
        wrong = lab.one(two, lab.hydrate(two, tampered(plan, halves_swapped)).session, seeded(12), (5,))
        assert bits(wrong.logprobs) != bits(right.logprobs)
        vault.fault = "down"
        with pytest.raises(StorageFailed, match=f"cannot read {vault.url}"):
            lab.hydrate(two, plan)
