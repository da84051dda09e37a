"""Inside the embedded engine: what its contract promises and the law book cannot see from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from thaw.core.errors import CorruptBlob, InvalidRequest, NotHit, StaleSession, ThawError
from thaw.core.prefix import windows
from thaw.engines import load_engine, restoring
from thaw.engines.base import Engine, GenerateRequest, SessionRef
from thaw.engines.embedded import transfer
from thaw.engines.embedded.backend import Backend, Feed
from thaw.engines.embedded.pages import PAGE, Extent, PagedKV
from thaw.engines.served.client.engine import ServedEngine
from thaw.testing.laws.kit import LIMIT_S, Lab, greedy, ids, seeded
from thaw.testing.plans import mount_at


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


def kv_of(engine: Engine, session: SessionRef) -> PagedKV:
    found: PagedKV = engine._sessions[session].kv  # type: ignore[attr-defined]
    return found


def pages(kv: PagedKV) -> list[tuple[Extent, int]]:
    return [kv.locate(page) for page in range(-(-kv.num_tokens // PAGE))]


@pytest.fixture
def batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each feed of every forward pass, as they ran."""
    backend: Backend = engine._backend  # type: ignore[attr-defined]
    seen: list[list[int]] = []
    real = backend.forward

    def watching(feeds: Sequence[Feed]) -> list[object]:
        seen.append([len(feed.tokens) for feed in feeds])
        return real(feeds)

    monkeypatch.setattr(backend, "forward", watching)
    return seen


@pytest.mark.parametrize("at", [None, 800, 768, 769, 767, 256, 3, 0])
def test_forking_copies_no_full_page(engine: Engine, lab: Lab, at: int | None) -> None:
    parent = lab.begin(engine, 800)
    children = lab.fork(engine, parent, 3, at=at)
    mine = pages(kv_of(engine, parent))
    tails = set()
    for child in children:
        theirs = pages(kv_of(engine, child))
        full = kv_of(engine, child).num_tokens // PAGE
        assert [(id(e), i) for e, i in theirs[:full]] == [(id(e), i) for e, i in mine[:full]]
        assert len(theirs) - full <= 1
        tails |= {id(extent) for extent, _ in theirs[full:]}
        assert all(extent.num_pages == 1 for extent, _ in theirs[full:])
    assert len(tails) in (0, 3) and tails.isdisjoint(id(extent) for extent, _ in mine)


def test_a_child_writes_into_no_page_that_it_shares(engine: Engine, lab: Lab) -> None:
    parent = lab.begin(engine, 700)
    kv = kv_of(engine, parent)
    heads = range(kv.factory.groups[0].num_blobs)
    before = [bytes(kv.read(head, a, b)) for a, b in windows(0, 700) for head in heads]
    lab.run(engine, *lab.fork(engine, parent, 3), sampling=seeded(8), prompt=ids(100, 4))
    assert before == [bytes(kv.read(head, a, b)) for a, b in windows(0, 700) for head in heads]


def test_children_of_children_share_too(engine: Engine, lab: Lab) -> None:
    parent = lab.begin(engine, 600)
    child = lab.fork(engine, parent)[0]
    engine.append(child, ids(300, 2)).result(LIMIT_S)
    grandchild = lab.fork(engine, child)[0]
    first, second, third = (kv_of(engine, s) for s in (parent, child, grandchild))
    assert pages(first)[:2] == pages(second)[:2] == pages(third)[:2]
    assert pages(second)[2] == pages(third)[2]


def test_the_group_is_one_forward_pass_a_step(engine: Engine, lab: Lab, batches: list[list[int]]) -> None:
    parent = lab.begin(engine, 300)
    children = lab.fork(engine, parent, 4)
    batches.clear()
    lab.run(engine, *children, sampling=seeded(6), prompt=(1, 2, 3))
    assert batches == [[3, 3, 3, 3]] + [[1, 1, 1, 1]] * 5


def test_other_work_never_joins_a_batch(engine: Engine, lab: Lab, batches: list[list[int]]) -> None:
    one, two = lab.begin(engine, 50), lab.begin(engine, 60)
    batches.clear()
    handles = [lab.start(engine, s, sampling=seeded(10)) for s in (one, two)]
    for handle in handles:
        handle.result(LIMIT_S)
    assert batches == [[1]] * 18


def test_usage_counts_the_tokens_that_really_ran(engine: Engine, lab: Lab, batches: list[list[int]]) -> None:
    """The engine's count of prefilled tokens is what went through the model, and a hydrated session runs none twice."""
    session = lab.begin(engine, 700)
    assert sum(map(sum, batches)) == 700
    moved = lab.move(engine, session, engine)
    batches.clear()
    out = lab.one(engine, moved, greedy(1), (1, 2, 3, 4))
    assert batches == [[4]] and out.usage.num_prefilled_tokens == 4 and out.num_cached_tokens == 700
    batches.clear()
    assert lab.one(engine, lab.move(engine, session, engine), greedy(1)).usage.num_prefilled_tokens == 0
    assert batches == []


def test_a_load_that_brings_too_little_is_not_hit(engine: Engine, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine counts what it loaded by itself, also when the plan's own check is blind."""
    plan = lab.plan(lab.capture(engine, lab.begin(engine, 600)))
    monkeypatch.setattr(restoring, "check_cover", lambda plan: None)
    with pytest.raises(NotHit, match="512 of 600"):
        lab.hydrate(engine, msgspec.structs.replace(plan, slices=plan.slices[:-1]))


def test_a_policy_set_while_kv_loads_does_not_adopt_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity is compared, then bytes are read; the policy may move in between."""
    with load_engine("fake") as engine:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 30)))
        real = transfer.load

        def slow(*args: object) -> object:
            loaded = real(*args)  # type: ignore[arg-type]
            engine.set_policy("next")
            return loaded

        monkeypatch.setattr(transfer, "load", slow)
        with pytest.raises((StaleSession, ThawError)):
            lab.one(engine, lab.hydrate(engine, plan).session, greedy(1))


def test_parking_lets_the_memory_go(engine: Engine, lab: Lab) -> None:
    session = lab.begin(engine, 600)
    assert pages(kv_of(engine, session))
    engine.park(session).result(LIMIT_S)
    assert kv_of(engine, session).runs == []


def test_parked_bytes_that_changed_are_refused(engine: Engine, lab: Lab) -> None:
    session = lab.begin(engine, 600)
    engine.park(session).result(LIMIT_S)
    file = engine._sessions[session].parked._file  # type: ignore[attr-defined]
    file.seek(10)
    old = file.read(1)
    file.seek(10)
    file.write(bytes([old[0] ^ 1]))
    with pytest.raises(CorruptBlob, match="parked"):
        lab.one(engine, session, greedy(1))


def test_a_forward_pass_that_fails_costs_its_own_request(
    engine: Engine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = lab.begin(engine, 30), lab.begin(engine, 30)
    with monkeypatch.context() as patch:
        patch.setattr(engine._backend, "forward", _explode)  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="out of memory"):
            lab.one(engine, session, greedy(4), (1,))
    assert not engine.view(session).running
    assert len(lab.one(engine, other, greedy(4)).token_ids) == 4


def _explode(_: object) -> None:
    raise RuntimeError("out of memory")


def test_a_session_that_cannot_be_read_again_is_not_left_open(
    engine: Engine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are children of which one could not be made: their caller has none of them."""
    session = lab.begin(engine, 300)
    plan = msgspec.structs.replace(lab.plan(lab.capture(engine, session)), policy="recompute", not_kept="so")
    bare = msgspec.structs.replace(plan, num_kv=0, slices=(), points=(), boundary=None, hidden=None)
    some = msgspec.structs.replace(plan, tokens=(*plan.tokens, 1, 2))
    held: dict[SessionRef, object] = engine._sessions  # type: ignore[attr-defined]
    before, made = set(held), 0

    def broken(*_: object, **__: object) -> object:
        nonlocal made
        made += 1
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._backend, "forward", broken)  # type: ignore[attr-defined]
    for attempt in (
        lambda: engine.reread(session, 100).result(LIMIT_S),
        lambda: lab.hydrate(engine, bare),
        lambda: lab.hydrate(engine, some),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            attempt()
        assert set(held) == before
    assert made == 3

    fork = PagedKV.fork

    def second_fails(kv: PagedKV, at: int) -> PagedKV:
        nonlocal made
        made += 1
        return broken() if made > 4 else fork(kv, at)  # type: ignore[return-value]

    monkeypatch.setattr(PagedKV, "fork", second_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        lab.fork(engine, session, 3)
    assert set(held) == before and made > 4


def test_many_threads_may_use_one_engine(engine: Engine, lab: Lab) -> None:
    """Every thread's result equals what it gets alone."""
    sessions = [lab.begin(engine, 40, start=i) for i in range(6)]
    alone = [lab.one(engine, lab.twin(engine, s), seeded(12)) for s in sessions]
    found: dict[int, tuple[int, ...]] = {}

    def work(i: int) -> None:
        lab.fork(engine, sessions[i], 2)
        lab.capture(engine, sessions[i])
        found[i] = lab.one(engine, sessions[i], seeded(12)).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert [found[i] for i in range(6)] == [out.token_ids for out in alone]


@pytest.mark.parametrize(
    "what", ["token", "blob size", "blob offset", "pack name", "hidden dtype", "hidden shape", "stored"]
)
def test_a_hostile_plan_meets_only_thaws_own_errors(engine: Engine, lab: Lab, what: str) -> None:
    """Objects are hashed, and their author chose what they say: a plan may be well-formed and absurd."""
    plan = lab.plan(lab.capture(engine, lab.begin(engine, 300)))
    group = plan.identity.groups[0].name
    first = plan.slices[0]
    change, new = msgspec.structs.replace, plan
    if what == "token":
        new = change(plan, tokens=(*plan.tokens, 1 << 31))
    elif what == "stored":
        new = change(plan, slices=(change(first, stored=255, length=255), *plan.slices[1:]))
    elif what.startswith("blob") or what == "pack name":
        options: dict[str, object] = {
            "blob size": {"nbytes": 1 << 40},
            "blob offset": {"offset": 1 << 40},
            "pack name": {"pack": "../../etc/passwd"},
        }[what]  # fmt: skip
        bad = change(first.blobs[group][0], **options)  # type: ignore[arg-type]
        new = change(plan, slices=(change(first, blobs={group: (bad, *first.blobs[group][1:])}), *plan.slices[1:]))
    else:
        assert plan.boundary is not None
        odd = {"hidden dtype": {"hidden_dtype": "complex"}, "hidden shape": {"hidden_shape": (1 << 30, 7)}}[what]
        new = change(plan, boundary=change(plan.boundary, **odd))  # type: ignore[arg-type]
    with pytest.raises(ThawError):
        session = lab.hydrate(engine, new).session
        engine.generate([GenerateRequest(session=session, sampling=greedy(1))]).result(LIMIT_S)


def test_a_generation_that_is_cancelled_before_it_begins_ends(engine: Engine, lab: Lab) -> None:
    """What stops it is not known yet when `cancel` is called."""
    session, go_on = lab.begin(engine, 20), threading.Event()
    engine._driver.call(go_on.wait)  # type: ignore[attr-defined]
    handle = engine.generate([GenerateRequest(session=session, sampling=greedy(200))])
    handle.cancel()
    go_on.set()
    assert handle.result(LIMIT_S)[0].finish_reason == "abort"
    engine.close_session(session)


def test_children_with_the_parents_seed_have_no_seeds_of_their_own(engine: Engine, lab: Lab) -> None:
    parent = lab.begin(engine, 8)
    before = engine.view(parent).seed
    with pytest.raises(InvalidRequest, match=r"replay=True .* seeds=\[5, 6\]"):
        engine.fork(parent, 2, replay=True, seeds=[5, 6])
    assert [engine.view(child).seed for child in engine.fork(parent, 2, replay=True).result()] == [before, before]
    assert [engine.view(child).seed for child in engine.fork(parent, 2, seeds=[5, 6]).result()] == [5, 6]


def test_served_engines_refuse_the_same_before_they_ask_anybody() -> None:
    with pytest.raises(InvalidRequest, match="leave one of the two out"):
        ServedEngine.fork(object(), "a session", 1, replay=True, seeds=[5])  # type: ignore[arg-type]
