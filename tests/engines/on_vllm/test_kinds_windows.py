"""Models with sliding windows on vLLM, each on a small random model: the laws, the edges, and controls that can see.

vLLM runs with its hybrid KV cache manager off: all layers have one block table, and windowed ones keep every token. A
snapshot holds of a window what goes on from its end. The engines are in this process, so that every page can be filled
with junk before a session comes back: whatever is read that was not loaded would be seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")
if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < (0, 32):
    pytest.skip("older releases refuse windows by name", allow_module_level=True)

from vllm_shapes import make_shaped  # noqa: E402

import thaw  # noqa: E402
from kind_models import WINDOW  # noqa: E402
from thaw.core.cache import SlidingKV, token_groups  # noqa: E402
from thaw.core.errors import NotKept  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Captured, Engine, SessionRef  # noqa: E402
from thaw.engines.vllm.settings import KEEPS_WINDOWS, VllmSettings, engine_args, settled  # noqa: E402
from thaw.testing import ExactnessTests  # noqa: E402
from thaw.testing.laws.bytes_law import blob_ids, kv_nbytes  # noqa: E402
from thaw.testing.laws.groups_law import GroupsLaw  # noqa: E402
from thaw.testing.laws.kit import Lab, bits, greedy, ids, same, seeded  # noqa: E402
from thaw.testing.laws.proof_law import ProofLaw  # noqa: E402
from thaw.testing.plans import mount_at  # noqa: E402

BLOCK = 128
BOOT: dict[str, Any] = {"enforce_eager": True, "max_model_len": 2048}
CHUNKS = pytest.mark.slow("the same on one more model")
ONCE_MORE = pytest.mark.soak("the same on one more model of the kind", receipt="vllm-windows-once-more")
HERE = (
    pytest.param("gemma3_text"),
    pytest.param("gpt_oss"),
    pytest.param("llama4_text", marks=CHUNKS),
    pytest.param("gemma2", marks=ONCE_MORE),
)
EDGES = (BLOCK - 1, BLOCK, BLOCK + 1, 255, 256, 257, WINDOW - 1, WINDOW, WINDOW + 1)
CUTS = sorted({*random.Random(22).sample(range(2, 700), 20), *EDGES})
GREEDY = thaw.Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
POWER = 100
"""How many times more than the noise of a batch's shape a control must move a log probability."""


class InPlace:
    """A vLLM of this process, and what lies under it."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        more = {**engine_args(settled(VllmSettings())), KEEPS_WINDOWS: True}
        # vLLM takes bfloat16 for float32 unless it is told, and its pages are few, so that filling them takes no time.
        self.llm = LLM(
            str(folder), dtype="float32", enforce_eager=True, max_model_len=2048, num_gpu_blocks_override=64, **more
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.folder = folder

    def fill_with_junk(self) -> None:
        """vLLM knows of no block any more, and each holds what no model computed."""
        assert self.llm.reset_prefix_cache()
        for cache in self.core.model_executor.driver_worker.worker.model_runner.kv_caches:
            cache.view(torch.uint8).fill_(0x55)

    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module", params=HERE)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(kind: str, tmp_path_factory: pytest.TempPathFactory, dtype: str) -> Path:
    return make_shaped(kind, tmp_path_factory.mktemp("windows") / kind, dtype=dtype)


@pytest.fixture(scope="module")
def here(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InPlace]:
    folder = made(kind, tmp_path_factory, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        running = InPlace(folder)
    yield running
    running.close()


@pytest.fixture(scope="module")
def engine(here: InPlace) -> Iterator[Engine]:
    with thaw.attach(here.llm) as attached:
        yield attached


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def sliding(engine: Engine) -> SlidingKV:
    return next(group for group in token_groups(engine.info.groups) if isinstance(group, SlidingKV))


def test_its_groups_are_those_of_the_transformers_engine(here: InPlace, engine: Engine) -> None:
    """So that snapshots cross: the same identity, field by field."""
    from thaw.engines import load_engine

    with load_engine("transformers", model=str(here.folder)) as other:
        assert engine.identity() == other.identity()
        assert [type(group).__name__ for group in engine.info.groups].count("SlidingKV") == 1


def test_a_cut_anywhere_goes_on_like_the_uninterrupted_parent(here: InPlace, engine: Engine, lab: Lab) -> None:
    """The parent goes on before its pages are filled with junk, and the child out of the snapshot behind it."""
    for count in CUTS:
        session = lab.begin(engine, count, start=count)
        plan = lab.plan(lab.capture(engine, session))
        whole = lab.one(engine, session, seeded(4), (5,))
        here.fill_with_junk()
        restored = lab.hydrate(engine, plan)
        assert restored.proof.num_cached_tokens == plan.num_kv == count - 1
        out = lab.one(engine, restored.session, seeded(4), (5,))
        same(whole, out)
        assert (out.num_cached_tokens, out.usage.num_prefilled_tokens) == (count - 1, 2), count
        for ref in (session, restored.session):
            engine.close_session(ref)


def test_a_cut_in_the_middle_of_generating_goes_on_like_the_uninterrupted_parent(
    here: InPlace, engine: Engine, lab: Lab
) -> None:
    for count in (WINDOW - 10, 250):
        captured, whole = lab.captured_amid(engine, lab.begin(engine, count))
        here.fill_with_junk()
        same(whole, lab.resume(engine, lab.hydrate(engine, lab.plan(captured)).session)[0])


@pytest.mark.parametrize("count", [100, 1000, 1900])
def test_a_snapshot_is_as_large_as_its_groups_shares(engine: Engine, lab: Lab, count: int) -> None:
    """At most 3 % over the full groups' bytes and, of a window, those of window + 255 tokens."""
    nbytes = kv_nbytes(lab.capture(engine, lab.begin(engine, count)))
    groups = token_groups(engine.info.groups)
    shares = [(g.token_nbytes * count, 1 if not isinstance(g, SlidingKV) else min(1, (g.window + 255) / count))
              for g in groups]  # fmt: skip
    assert nbytes <= 1.03 * sum(whole * share for whole, share in shares)


def test_twenty_turns_write_their_own_tokens_and_the_last_goes_on_like_its_parent(
    here: InPlace, engine: Engine, lab: Lab
) -> None:
    session = lab.begin(engine, 250)
    captures: list[Captured] = []
    for turn in range(20):
        out = lab.one(engine, session, seeded(3), ids(4, 9 + turn))
        assert out.usage.num_prefilled_tokens <= 5
        captures.append(lab.capture(engine, session, captures[-1].num_kv if captures else 0))
    whole = lab.one(engine, session, seeded(8))
    here.fill_with_junk()
    same(whole, lab.one(engine, lab.hydrate(engine, lab.plan(captures[-1], *captures[:-1])).session, seeded(8)))


def test_restored_bytes_equal_captured_bytes(here: InPlace, engine: Engine, lab: Lab) -> None:
    for count in (1, WINDOW, WINDOW + 1, BLOCK + 1, 700):
        first = lab.capture(engine, lab.begin(engine, count))
        here.fill_with_junk()
        assert blob_ids(lab.capture(engine, lab.hydrate(engine, lab.plan(first)).session)) == blob_ids(first)


class TestLawsOfWindows(GroupsLaw, ProofLaw):
    """The laws of groups and proofs. `other` is the same engine, whose pages are full of junk before each law."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, engine: Engine) -> Engine:
        return engine

    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, engine: Engine) -> Engine:
        return engine

    @pytest.fixture(autouse=True)
    def junk(self, here: InPlace) -> None:
        here.fill_with_junk()


# --- earlier tokens


def test_a_live_session_is_forked_at_any_token(here: InPlace, engine: Engine, lab: Lab) -> None:
    """As full attention is: vLLM keeps what has left a window, and so does the arena."""
    session = lab.begin(engine, 600, start=3)
    for at in (2, WINDOW, 130, 257, 599):
        before = lab.one(engine, lab.twin(engine, session, at), seeded(4), (5,))
        here.fill_with_junk()
        same(before, lab.one(engine, lab.twin(engine, session, at), seeded(4), (5,)))


def test_a_restored_session_is_forked_where_its_window_is_and_refused_by_name_elsewhere(
    here: InPlace, engine: Engine, lab: Lab
) -> None:
    session, group = lab.begin(engine, 600), sliding(engine)
    plan = lab.plan(lab.capture(engine, session))
    whole = lab.one(engine, lab.twin(engine, session), seeded(6), (5,))
    here.fill_with_junk()
    restored = lab.hydrate(engine, plan).session
    first = group.covers(plan.num_kv - 1).start
    assert "interior-points" not in engine.info.capabilities
    for at in (100, 300, plan.num_kv - 1):
        said = f"after {at - 1} tokens the group {group.name} .* from {first} on. Continue from token {plan.num_kv} or"
        with pytest.raises(NotKept, match=said):
            lab.fork(engine, restored, at=at)
    lab.fork(engine, restored, at=plan.num_kv)
    same(whole, lab.one(engine, lab.twin(engine, restored), seeded(6), (5,)))
    lab.one(engine, restored, greedy(60), ids(20, 4))
    for at in (plan.num_kv, 620, 640, 680):
        one, two = (lab.one(engine, lab.twin(engine, restored, at), seeded(4), (5,)) for _ in range(2))
        here.fill_with_junk()
        same(one, lab.one(engine, lab.twin(engine, restored, at), seeded(4), (5,)))
        same(one, two)


def test_a_fork_inside_a_committed_session_is_committed_whole(here: InPlace, engine: Engine, tmp_path: Path) -> None:
    """The parent's commit holds the window of its end, not that of the fork: the child's commit writes it too, and
    nothing else of the prefix."""
    repo = thaw.open(tmp_path / "repo", engine=engine)
    with repo.session(seed=1) as parent:
        parent.append(token_ids=ids(600))
        parent.commit("parent", branch="main")
        (child,) = parent.fork(1, at=300)
        child.append(token_ids=ids(7, 5))
        before = blobs_nbytes(repo)
        child.commit("child", branch="child")
        groups = token_groups(engine.info.groups)
        window = sum(group.token_nbytes for group in groups) * (7 + sliding(engine).window)
        assert blobs_nbytes(repo) - before <= window + 4096
        live = child.generate("", GREEDY)
    here.fill_with_junk()
    with repo.session("child") as restored:
        same(live, restored.generate("", GREEDY))
    assert {300, 307} & set(repo.show("child").resumable or ()) == {307}


def blobs_nbytes(repo: Any) -> int:
    return sum(path.stat().st_size for path in (repo.path / "packs").rglob("*") if path.is_file())


def test_nobody_reads_the_blocks_whose_window_was_not_loaded(here: InPlace, engine: Engine, lab: Lab) -> None:
    """A restored session's first blocks hold junk in its windowed layers. Others begin with the same tokens: a plain
    request, another session, one that shares its prefix with all, and a child of the first token. Each computes all of
    them itself, as in an engine that has nothing."""
    tokens = ids(600, 8)
    session = engine.open(seed=20, share_prefix=True)
    engine.append(session, tokens).result()
    plan = lab.plan(lab.capture(engine, session))
    assert plan.share_prefix
    asked = vllm.SamplingParams(temperature=0.0, max_tokens=4, logprobs=0, detokenize=False)

    def plain() -> list[str]:
        (out,) = here.llm.generate([{"prompt_token_ids": list(tokens[:400])}], asked, use_tqdm=False)
        (one,) = out.outputs
        return bits([step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)])

    here.fill_with_junk()
    right = plain()
    here.fill_with_junk()
    restored = lab.hydrate(engine, plan).session
    assert plain() == right
    shared = engine.open(seed=20, share_prefix=True)
    engine.append(shared, tokens[:400]).result()
    child = lab.twin(engine, restored, 1)
    engine.append(child, tokens[1:400]).result()
    own = lab.begin(engine, 1)
    for other in (shared, child):
        assert bits(lab.one(engine, other, greedy(4)).logprobs) == right
    engine.close_session(own)


# --- controls


def test_controls_that_can_see(kind: str, here: InPlace, engine: Engine, lab: Lab) -> None:
    """Another session's window, one token of it, a token that is not there, and all of a full group: each moves a log
    probability by far more than the shape of a batch does."""
    count = 300
    session, other = lab.begin(engine, count), lab.begin(engine, count, start=7)
    plan, strange = (lab.plan(lab.capture(engine, one)) for one in (session, other))
    right = tops(lab, engine, lab.twin(engine, session))
    beside = [lab.begin(engine, n, start=n) for n in (20, 200, 310)]
    noise = max(
        apart(right, tops(lab, engine, lab.twin(engine, session), *beside)),
        apart(right, tops(lab, engine, in_parts(engine, count))),
    )
    moved = {}
    for group in token_groups(engine.info.groups):
        foreign = lab.hydrate(engine, mixed(plan, strange, group.name)).session
        moved[f"{group.name}: of another session"] = apart(right, tops(lab, engine, foreign))
    group = sliding(engine)
    first = count // BLOCK * BLOCK if kind == "llama4_text" else group.covers(plan.num_kv).start  # a chunk's first one
    for what, token in (("one token of another session", first), ("a window one token short", first)):
        restored, stranger = (lab.hydrate(engine, one).session for one in (plan, strange))
        mine, theirs = (arena(here, engine, ref, group) for ref in (restored, stranger))
        mine(token).copy_(theirs(token) if "another" in what else torch.zeros(1))
        here.fill_with_junk()
        moved[f"{group.name}: {what}"] = apart(right, tops(lab, engine, restored))
    blind = {what: value for what, value in moved.items() if value < max(POWER * noise, 1e-5)}
    assert blind == {}, (noise, moved)
    restored = lab.hydrate(engine, plan).session
    arena(here, engine, restored, group)(first - 1).fill_(3.0)
    here.fill_with_junk()
    assert apart(right, tops(lab, engine, restored)) == 0.0, "the token before the window is not looked at"


def in_parts(engine: Engine, count: int) -> SessionRef:
    """The session of `Lab.begin`, read in two parts."""
    session, tokens = engine.open(seed=20), ids(count)
    engine.append(session, tokens[: count // 2]).result()
    engine.append(session, tokens[count // 2 :]).result()
    return session


def mixed(plan: Any, strange: Any, name: str) -> Any:
    slices = tuple(
        msgspec.structs.replace(mine, blobs={**mine.blobs, name: theirs.blobs[name]}) if name in mine.blobs else mine
        for mine, theirs in zip(plan.slices, strange.slices, strict=True)
    )
    return msgspec.structs.replace(plan, slices=slices)


def tops(lab: Lab, engine: Engine, *sessions: SessionRef) -> dict[int, float]:
    """The first one's most likely tokens, with their log probabilities: its last token runs again, over its KV."""
    out = lab.run(engine, *sessions, sampling=greedy(1, logprobs=20))[0]
    turn = engine.view(sessions[0]).turns[-1]
    assert turn.top_logprobs is not None and len(out.token_ids) == 1
    return dict(turn.top_logprobs[0])


def apart(one: dict[int, float], two: dict[int, float]) -> float:
    """How far the log probabilities of what both name lie apart at most; infinite where they name nothing alike."""
    return max((abs(one[token] - two[token]) for token in one.keys() & two.keys()), default=float("inf"))


def arena(here: InPlace, engine: Engine, session: SessionRef, group: SlidingKV) -> Callable[[int], Any]:
    """A token's keys and values of the group in the engine's arena, of a session that was just hydrated."""
    worker = here.worker()
    (strip,) = [at for at, one in enumerate(worker._arena._groups.strips) if one.group.name == group.name]
    record = worker._records[engine._get(session).node.name]  # type: ignore[attr-defined]
    return lambda token: record.pieces[0].view(strip, token, token + 1)


# --- engines of their own processes


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """OLMo 3, booted as users do: thaw sets the flag that keeps its windows. Its snapshots hold those of all
    tokens."""
    folder = made("olmo3", tmp_path_factory, "bfloat16")
    with load_engine("vllm", model=str(folder), interior=True, **BOOT) as loaded:
        yield loaded


class TestLawsOfEveryToken(ExactnessTests):
    """With the windows of all tokens, as of full attention: also of earlier tokens, from disk."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, there: Engine) -> Engine:
        assert "interior-points" in there.info.capabilities and sliding(there).window == WINDOW
        return there

    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, there: Engine) -> Engine:
        return there


def test_a_session_of_one_process_goes_on_in_another_bit_for_bit(there: Engine, lab: Lab) -> None:
    """The other's snapshots are of the end alone, and it takes those that hold more."""
    sessions = [lab.begin(there, count) for count in (WINDOW + 1, 256, 301)]
    plans = [lab.plan(lab.capture(there, session)) for session in sessions]
    with load_engine("vllm", model=there.info.model, **BOOT) as other:
        for session, plan in zip(sessions, plans, strict=True):
            theirs = lab.one(other, lab.hydrate(other, plan).session, seeded(8), (5,))
            same(lab.one(there, session, seeded(8), (5,)), theirs)
            assert theirs.usage.num_prefilled_tokens == 2


@pytest.mark.slow("boots an engine of two ranks")
def test_two_ranks_hand_a_session_to_one_and_take_it_back(tmp_path_factory: pytest.TempPathFactory, lab: Lab) -> None:
    """gpt-oss, each rank with one of two KV heads: blobs go from 2 ranks to 1 and back, and are the same bytes."""
    folder = made("gpt_oss", tmp_path_factory, "bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        two = load_engine("vllm", model=str(folder), tensor_parallel_size=2, **BOOT)
    with two, load_engine("vllm", model=str(folder), **BOOT) as one:
        session = lab.begin(two, 700)
        first = lab.capture(two, session)
        assert len(first.packs) == 2
        moved = lab.hydrate(one, lab.plan(first)).session
        second = lab.capture(one, moved)
        assert blob_ids(second) == blob_ids(first)
        back = lab.hydrate(two, lab.plan(second)).session
        same(lab.one(two, session, seeded(6), (5,)), lab.one(two, back, seeded(6), (5,)))
        lab.one(one, moved, seeded(6), (5,))
        onward = lab.hydrate(two, lab.plan(lab.capture(one, moved))).session
        assert lab.one(two, onward, greedy(4)).num_cached_tokens == 706
