"""Options of vLLM's that change how it schedules: in each, sessions go on bit for bit, or the option is refused by name
before vLLM starts. And requests that are none of thaw's, or that ask for more than a session can continue with.

Bits are compared where both sides run alone or in groups of one size.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import re
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import thaw
from damaged_models import DAMAGED, damaged
from thaw.core.errors import BadSampling, Cancelled, IncompleteModel, InvalidRequest, Unsupported
from thaw.core.sampling import Sampling
from thaw.data.locations import StoreMount
from thaw.engines import load_engine
from thaw.engines.base import Completion, Handle, SessionRef
from thaw.repo import CommitResult, Repository
from thaw.testing.laws.kit import LIMIT_S, Lab, every_knob, greedy, ids, same, seeded, wait_for
from thaw.testing.plans import capture_plan, halves_swapped, mount_at, tampered

pytest.importorskip("vllm")

from thaw.engines.served import protocol
from thaw.engines.vllm import support, versions
from thaw.engines.vllm.client.engine import VllmEngine
from thaw.engines.vllm.settings import VllmSettings, engine_args

CHUNK = 64
POOL = 3072
"""Tokens that the engine's blocks hold, so that a few other prompts push out everything."""
CLOSE = 0.05
"""Largest difference of a log probability where the same tokens were read in chunks of other sizes. Wrong KV moves them
by more (the negative control)."""
BOOTS: dict[str, dict[str, Any]] = {
    "no prefix cache": {"enable_prefix_caching": False, "num_gpu_blocks_override": POOL // 128},
    "small chunks": {
        "max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True, "num_gpu_blocks_override": POOL // 128,
        "max_logprobs": -1,  # no limit, as TRL starts its server
    },
    "small blocks": {"block_size": 32, "num_gpu_blocks_override": POOL // 32, "reasoning_parser": "granite"},
}  # fmt: skip
STYLES = {"greedy": greedy(16), "seeded": seeded(16), "every knob": every_knob()}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama", dtype="bfloat16", head_dim=64))


@pytest.fixture(scope="module", params=list(BOOTS))
def engine(folder: str, request: pytest.FixtureRequest) -> Iterator[VllmEngine]:
    options = BOOTS[str(request.param)]
    with load_engine("vllm", model=folder, enforce_eager=True, max_model_len=2560, **options) as loaded:
        assert isinstance(loaded, VllmEngine)
        yield loaded


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> StoreMount:
    return mount_at(tmp_path_factory.mktemp("packs"))


@pytest.fixture
def lab(mount: StoreMount) -> Lab:
    return Lab(mount)


def only(boot: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("engine", [boot], indirect=True)


def cycle(engine: VllmEngine, lab: Lab) -> None:
    """Other prompts through the whole pool, so that nothing is found there."""
    for start in (100, 101):
        engine.close_session(lab.begin(engine, 2000, start=start))


def close(one: Completion, two: Completion) -> float:
    """The largest difference of a log probability, over equal tokens."""
    assert one.token_ids == two.token_ids
    return max(abs(a - b) for a, b in zip(one.logprobs, two.logprobs, strict=True))


# --- in every boot


@pytest.mark.parametrize("style", STYLES)
def test_resumed_from_disk_it_goes_on_bit_for_bit(engine: VllmEngine, lab: Lab, style: str) -> None:
    session = lab.begin(engine, 300)
    whole = lab.one(engine, lab.twin(engine, session), STYLES[style])
    moved = lab.one(engine, lab.move(engine, session, engine), STYLES[style])
    same(whole, moved)
    assert (moved.num_cached_tokens, moved.usage.num_prefilled_tokens) == (299, 1)
    child = lab.twin(engine, session)
    lab.one(engine, child, STYLES[style])
    for cut in (1, 9):
        part = lab.move(engine, lab.twin(engine, child, at=300 + cut), engine)
        cycle(engine, lab)
        same(whole, lab.resume(engine, part)[0])


def test_four_children_live_equal_four_that_come_from_disk(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 300, start=1)
    moved = lab.move(engine, session, engine)
    here = lab.run(engine, *lab.fork(engine, session, 4), sampling=seeded(16), prompt=(7, 7))
    cycle(engine, lab)
    there = lab.run(engine, *lab.fork(engine, moved, 4), sampling=seeded(16), prompt=(7, 7))
    for one, two in zip(here, there, strict=True):
        same(one, two)
        assert one.num_cached_tokens == two.num_cached_tokens == 299
    assert len({one.token_ids for one in here}) == 4


def test_captured_while_it_decodes_it_goes_on_bit_for_bit(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 300, start=2)
    captured, whole = lab.captured_amid(engine, session)
    same(whole, lab.resume(engine, lab.hydrate(engine, lab.plan(captured)).session)[0])


def test_parked_it_outlives_its_blocks(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 500, start=3)
    expected = lab.one(engine, lab.twin(engine, session), seeded(12))
    assert engine.park(session).result(LIMIT_S).parked
    for _ in range(3):
        cycle(engine, lab)
    back = lab.one(engine, session, seeded(12))
    same(expected, back)
    assert back.num_cached_tokens == 499


@pytest.mark.parametrize("piece", [0, -1])
def test_negative_control_one_block_of_wrong_kv_changes_the_logprobs(engine: VllmEngine, lab: Lab, piece: int) -> None:
    session = lab.begin(engine, 400, start=4)
    plan = lab.plan(lab.capture(engine, session))
    right = lab.one(engine, session, greedy(8), (5,))
    wrong = tampered(plan, halves_swapped, piece=piece % len(plan.slices))
    outs = [lab.one(engine, lab.hydrate(engine, p).session, greedy(8), (5,)) for p in (plan, wrong)]
    same(right, outs[0])
    assert abs(right.logprobs[0] - outs[1].logprobs[0]) > CLOSE


# --- in one of them


@only("no prefix cache")
def test_without_a_prefix_cache_all_comes_from_the_arena(engine: VllmEngine, lab: Lab) -> None:
    """And pins hold nothing, for there is nothing that vLLM would find again."""
    session = lab.begin(engine, 300, start=5)
    before = engine.stats()
    assert engine.pin(session, 60.0).result(LIMIT_S) == 0
    lab.run(engine, *lab.fork(engine, session, 4), sampling=greedy(2))
    after = engine.stats()
    assert after["hit_tokens"] == 0 and after["loaded_tokens"] - before["loaded_tokens"] == 4 * 299


@only("small blocks")
def test_small_blocks_are_shared_by_children(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 300, start=5)
    assert engine.info.numerics["block_size"] == "32"
    before = engine.stats()
    lab.run(engine, *lab.fork(engine, session, 4), sampling=greedy(2))
    after = engine.stats()
    assert after["hit_tokens"] - before["hit_tokens"] >= 3 * 288, "nine full blocks each"
    assert engine.pin(session, 60.0).result(LIMIT_S) == 288
    engine.release_pins()


@only("small blocks")
def test_structured_output_behind_a_reasoning_parser_is_refused_with_the_reason(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 40, start=16)
    with pytest.raises(BadSampling, match=r"structured_outputs: this vLLM runs with a reasoning parser"):
        lab.one(engine, session, Sampling(max_tokens=4, structured_outputs={"regex": "a+"}))  # type: ignore[arg-type]
    assert lab.one(engine, session, greedy(4)).token_ids


LONG = 2000
PAUSES_S = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06)


def reading(engine: VllmEngine, start: int, pause_s: float) -> tuple[SessionRef, Handle[Any]]:
    """A session that has been reading a long prompt for a while."""
    session = engine.open(seed=20)
    handle = engine.append(session, ids(LONG, start))
    while not engine.view(session).running:
        assert not handle.done()
        time.sleep(0.0005)
    time.sleep(pause_s)
    return session, handle


def goes_on_as(engine: VllmEngine, lab: Lab, session: SessionRef, start: int, expected: Completion) -> None:
    """Reads what is left of the prompt, in other chunks than a session that was never stopped."""
    read = len(engine.view(session).tokens)
    assert engine.view(session).tokens == ids(LONG, start)[:read]
    cycle(engine, lab)
    out = lab.one(engine, session, greedy(8), ids(LONG, start)[read:])
    assert close(out, expected) < CLOSE
    assert out.num_cached_tokens == max(0, read - 1)


@only("small chunks")
def test_a_prompt_that_is_stopped_in_the_middle_keeps_what_was_read(engine: VllmEngine, lab: Lab) -> None:
    expected = lab.one(engine, lab.begin(engine, LONG, start=6), greedy(8))
    reads = []
    for pause_s in PAUSES_S:
        session, handle = reading(engine, 6, pause_s)
        handle.cancel()
        try:
            handle.result(LIMIT_S)
        except Cancelled:
            reads.append(len(engine.view(session).tokens))
            goes_on_as(engine, lab, session, 6, expected)
        engine.close_session(session)
    assert any(0 < read < LONG and read % CHUNK == 0 for read in reads), reads


@only("small chunks")
def test_a_capture_in_the_middle_of_a_prompt_has_what_was_read(engine: VllmEngine, lab: Lab, mount: StoreMount) -> None:
    expected = lab.one(engine, lab.begin(engine, LONG, start=7), greedy(8))
    reads = []
    for pause_s in PAUSES_S:
        session, handle = reading(engine, 7, pause_s)
        captured = engine.capture(session, capture_plan(mount)).result(LIMIT_S)
        handle.result(LIMIT_S)
        same(lab.one(engine, session, greedy(8)), expected)  # it was not disturbed
        if len(captured.tokens) < LONG:
            assert captured.num_kv == len(captured.tokens)
            reads.append(captured.num_kv)
            goes_on_as(engine, lab, lab.hydrate(engine, lab.plan(captured)).session, 7, expected)
    assert any(0 < read < LONG - 256 and read % CHUNK == 0 for read in reads), reads


def half_read(repo: Repository, generate: bool) -> CommitResult:
    """A commit in the middle of an append, or of the prompt of a generate: of what was read by then."""
    for tried in range(5):  # the prompt may have been read before this thread gets its turn
        session = repo.session(seed=20)
        session.append(token_ids=ids(10, 8))
        act = session.generate if generate else session.append
        more = {"sampling": greedy(4)} if generate else {}
        worker = threading.Thread(target=act, kwargs={"token_ids": ids(LONG, 9), **more})
        worker.start()
        while worker.is_alive() and not session.view().running:
            time.sleep(0.0005)
        time.sleep(0.02)
        commit = session.commit("in the middle", branch=f"half-{generate}-{tried}")
        worker.join(LIMIT_S)
        if 10 < commit.num_tokens < 10 + LONG - 256:
            return commit
    raise AssertionError("every prompt was read, or not begun, when it was committed")


@only("small chunks")
def test_a_commit_in_the_middle_of_a_prompt_is_one_from_which_one_goes_on(engine: VllmEngine, tmp_path: Path) -> None:
    with thaw.init(tmp_path / "runs", engine=engine) as repo:
        for generate in (False, True):
            commit = half_read(repo, generate)
            half = repo.session(commit.commit)
            assert half.view().tokens == (*ids(10, 8), *ids(LONG, 9))[: commit.num_tokens]
            assert len(half.generate(token_ids=ids(3, 10), sampling=greedy(4)).token_ids) == 4


# --- requests that are not thaw's, or ask for too much


def ask(engine: VllmEngine, prompt: tuple[int, ...], **fields: Any) -> Any:
    """The last output of a request of the engine's owner."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm: Any = engine._transport._llm  # type: ignore[attr-defined]
    params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **fields)

    async def run() -> Any:
        name = f"own-{secrets.token_hex(4)}"
        return [out async for out in llm.generate({"prompt_token_ids": list(prompt)}, params, name)][-1]

    return asyncio.run_coroutine_threadsafe(run(), engine._loop.inner).result(LIMIT_S)


def grammar(regex: str) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(regex=regex)


@only("no prefix cache")
def test_a_plain_request_may_ask_for_anything(engine: VllmEngine, lab: Lab) -> None:
    """Also while a session of thaw's decodes beside it, with thaw's own sampling."""
    session = lab.begin(engine, 300, start=11)
    before = engine.stats()
    running = lab.start(engine, session, sampling=every_knob(400))
    wait_for(running, 2)
    grown = ask(engine, ids(40, 12), structured_outputs=grammar("(ab|cd){3}x"), temperature=1.0, max_tokens=20)
    assert re.fullmatch("(ab|cd){3}x", engine.codec.decode(grown.outputs[0].token_ids))
    two = ask(engine, ids(40, 12), n=2, seed=1, max_tokens=12, ignore_eos=True)
    assert [len(one.token_ids) for one in two.outputs] == [12, 12]
    assert two.outputs[0].token_ids != two.outputs[1].token_ids
    out = running.result(LIMIT_S)[0]
    assert len(out.token_ids) == len(out.logprobs) > 10
    whole = engine.view(session).tokens
    scored = ask(engine, whole, prompt_logprobs=0, max_tokens=1, temperature=0.0).prompt_logprobs
    assert len(scored) == len(whole) and scored[0] is None
    found = [scored[i][whole[i]].logprob for i in range(300, len(whole))]
    assert max(abs(a - b) for a, b in zip(found, out.logprobs, strict=True)) < CLOSE, "one prompt, and step by step"
    after = engine.stats()
    assert after["refused"] == before["refused"] and after["running"] == 0


@only("no prefix cache")
def test_what_vllm_itself_refuses_is_an_invalid_request(engine: VllmEngine, lab: Lab) -> None:
    if engine.info.version.startswith("0.26."):
        pytest.skip("vLLM 0.26 takes stop_token_ids that no token has")
    session = lab.begin(engine, 60, start=16)
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        lab.one(engine, session, greedy(2, stop_token_ids=(engine.info.vocab_size,)))
    assert len(lab.one(engine, session, greedy(2)).token_ids) == 2


TOO_MUCH: dict[str, Any] = {
    "n": 2,
    "structured_outputs": "a+b",
    "prompt_logprobs": 1,
    "skip_reading_prefix_cache": True,
}


def beside(engine: VllmEngine, name: str) -> Any:
    """A request with a message of thaw's, which also asks for this."""
    value = grammar(TOO_MUCH[name]) if name == "structured_outputs" else TOO_MUCH[name]
    message = protocol.Run(id=secrets.token_hex(16), record=secrets.token_hex(16))
    extra = {"kv_transfer_params": protocol.params(message)}
    return ask(engine, ids(40, 13), temperature=1.0, seed=1, max_tokens=6, extra_args=extra, **{name: value})


@only("no prefix cache")
@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_a_session_cannot_go_on_with_is_refused_for_that_request_alone(
    engine: VllmEngine, lab: Lab, name: str
) -> None:
    session = lab.begin(engine, 60, start=14)
    expected = lab.one(engine, lab.twin(engine, session), seeded(8))
    before = engine.stats()
    with pytest.raises(versions.refusals(), match=rf"^{name} in a request that carries kv_transfer_params\['thaw'\]"):
        beside(engine, name)
    assert engine.stats() == before, "the engine never saw it"
    same(expected, lab.one(engine, session, seeded(8)))


@only("no prefix cache")
@pytest.mark.parametrize("name", TOO_MUCH)
def test_it_is_refused_behind_a_front_end_that_lets_it_pass(
    engine: VllmEngine, lab: Lab, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where vLLM's V2 runner takes no logits processor: then nothing of thaw's is asked at admission. A request that
    vLLM loads nothing for cannot be stopped, but nothing of it is kept, and its end says why."""
    from thaw.engines.vllm.sampling import ThawSampling

    session = lab.begin(engine, 60, start=15)
    expected = lab.one(engine, lab.twin(engine, session), seeded(8))
    before = engine.stats()
    with monkeypatch.context() as patch:
        patch.setattr(ThawSampling, "validate_params", lambda params: None)
        out = beside(engine, name)
    reasons = sorted(one.finish_reason for one in out.outputs)
    unread = reasons == ["length"] and name in ("prompt_logprobs", "skip_reading_prefix_cache")  # vLLM 0.32; 0.26 asks
    assert unread or reasons == (["error", "length"] if name == "n" else ["error"])
    after = engine.stats()
    assert after["refused"] == before["refused"] + 1 and after["running"] == 0
    assert after["records"] == before["records"] + (name == "n")
    answers = (engine._transport.mail.folder / "answers").iterdir()
    assert any(f"{name} in a request that carries" in path.read_text() for path in answers)
    if unread:
        assert f"{name} in a request that carries" in out.kv_transfer_params["thaw"]["error"]
    same(expected, lab.one(engine, session, seeded(8)))


@only("small blocks")
def test_where_vllm_samples_itself_a_bad_word_that_has_begun_is_not_forgotten(
    engine: VllmEngine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client sends for the V2 runner, here to a V1: greedy tokens are the same. A request that begins between
    two tokens of a bad word would forget the first one, so it is refused; elsewhere it is not."""
    session = lab.begin(engine, 60, start=17)
    letters = dict.fromkeys(range(97, 123), 100.0)
    free = lab.one(engine, lab.twin(engine, session), greedy(12, logit_bias=letters))
    at = next(i for i in range(2, 11) if free.token_ids[i] != free.token_ids[i - 1])
    word = chr(free.token_ids[at - 1]) + chr(free.token_ids[at])
    sampling = greedy(12, logit_bias=letters, bad_words=(word,))
    expected = lab.one(engine, lab.twin(engine, session), sampling)
    assert expected.token_ids[at] != free.token_ids[at]
    dialect = engine._talk.dialect
    monkeypatch.setattr(dialect, "facts", msgspec.structs.replace(dialect.facts, runner="V2"))
    child = lab.twin(engine, session)
    same(expected, lab.one(engine, child, sampling))
    with pytest.raises(Unsupported, match=rf"bad_words \(one of them, '{word}', has begun\)"):
        lab.resume(engine, lab.twin(engine, child, at=60 + at))
    same(expected, lab.resume(engine, lab.twin(engine, child, at=60 + at + 1))[0])
    lab.one(engine, child, greedy(4, presence_penalty=0.5))
    with pytest.raises(Unsupported, match="presence_penalty"):
        lab.resume(engine, lab.twin(engine, child, at=74))


@only("small blocks")
def test_where_vllm_samples_itself_entropies_are_refused(
    engine: VllmEngine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its V2 runner shows logits to others only after biases and penalties. The control: on the V1 runner it works."""
    session, dialect = lab.begin(engine, 20), engine._talk.dialect
    assert len(lab.one(engine, session, greedy(3, entropy=True)).entropies or ()) == 3
    v2 = msgspec.structs.replace(dialect.facts, runner="V2")
    assert engine.capabilities_of(dialect.facts) - engine.capabilities_of(v2) == {"entropy"}
    monkeypatch.setattr(dialect, "facts", v2)
    with pytest.raises(Unsupported, match=r"entropy: .*VLLM_USE_V2_MODEL_RUNNER=0"):
        lab.one(engine, session, greedy(3, entropy=True))


@only("small blocks")
def test_without_lora_adapters_are_refused_by_name(engine: VllmEngine, tmp_path: Path) -> None:
    assert engine.adapters() == {} and "adapters" not in engine.info.capabilities
    for ask in (lambda: engine.open(adapter="law"), lambda: engine.load_adapter("law", tmp_path)):
        with pytest.raises(Unsupported, match="runs no adapters: start it with enable_lora"):
            ask()


# --- refused before vLLM starts

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "blocks of 16": ({"block_size": 16}, "block_size=16: .* multiples of 32"),
    "fp8 KV": ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
    "pipeline parallel": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "speculative decoding",
    ),
    "prompt embeddings": ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
    "other log probabilities": ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode=processed_logprobs"),
    "logits for log probabilities": ({"logprobs_mode": "raw_logits"}, "logprobs_mode=raw_logits"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_by_name_before_vllm_starts(folder: str, what: str) -> None:
    options, says = REFUSED[what]
    before = set(threading.enumerate())
    with pytest.raises(Unsupported, match=says):
        load_engine("vllm", model=folder, enforce_eager=True, max_model_len=512, **options)
    ends = time.monotonic() + 5.0
    while {thread for thread in threading.enumerate() if thread.name == "thaw-vllm"} - before:
        assert time.monotonic() < ends, "its thread was left"
        time.sleep(0.01)


def test_a_watermark_is_refused(folder: str) -> None:
    """Where this vLLM has them: their configuration depends on the runner, so it is put there by hand."""
    config = configured(folder, VllmSettings())
    support.require_config(config)
    object.__setattr__(config, "watermark_config", object())
    with pytest.raises(Unsupported, match="watermarking"):
        support.require_config(config)


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_model_is_refused_by_name_before_vllm_starts(folder: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(IncompleteModel, match=DAMAGED[what][1]):
        load_engine(
            "vllm", model=str(damaged(Path(folder), tmp_path / "m", what)), enforce_eager=True, max_model_len=512
        )


@pytest.mark.parametrize("load_format", ["pt", "npcache", "dummy"])
def test_other_files_than_the_identitys_are_not_loaded(folder: str, load_format: str) -> None:
    with pytest.raises(Unsupported, match=f"load_format={load_format}"):
        load_engine("vllm", model=folder, load_format=load_format, enforce_eager=True, max_model_len=512)


def test_mistrals_own_files_are_not_taken_unasked(folder: str, tmp_path: Path) -> None:
    """vLLM takes them before all others, and the identity is made of the others."""
    shutil.copytree(folder, tmp_path / "m")
    shutil.copy(tmp_path / "m" / "model.safetensors", tmp_path / "m" / "consolidated.safetensors")
    with pytest.raises(Unsupported, match=r"consolidated.*load_format=hf"):
        support.require_config(configured(str(tmp_path / "m"), VllmSettings()))


def configured(folder: str, settings: VllmSettings, others: tuple[str, ...] = (), policy: str = "fail") -> Any:
    """vLLM's configuration of an engine with thaw in it."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments: dict[str, Any] = engine_args(settings, others)
    arguments["kv_transfer_config"]["kv_load_failure_policy"] = policy
    return AsyncEngineArgs(model=folder, max_model_len=512, **arguments).create_engine_config()


def full_attention() -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["0"], spec)])


@pytest.mark.parametrize("others", [(), ("ExampleConnector",)], ids=["alone", "beside another"])
def test_a_server_that_computes_again_what_could_not_be_loaded_is_refused(folder: str, others: tuple[str, ...]) -> None:
    """thaw's refusals end a request by a load that fails. Inside `MultiConnector` a child's own part does not say what
    vLLM does with it."""
    from vllm.config import KVTransferConfig, set_current_vllm_config

    for said in ("fail", "recompute"):
        config = configured(folder, VllmSettings(), others, said)
        own = copy.copy(config)
        if others:
            child = config.kv_transfer_config.kv_connector_extra_config["connectors"][0]
            own.kv_transfer_config = KVTransferConfig(**child)
        with set_current_vllm_config(config):
            if said == "fail":
                support.require(own, full_attention())
                continue
            with pytest.raises(Unsupported, match=r"kv_load_failure_policy=recompute: .* leave it out"):
                support.require(own, full_attention())
        with pytest.raises(Unsupported, match="kv_load_failure_policy=recompute"):
            support.require_config(config)


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, ""),
    "mistral": ("llama", {**MISTRAL, "sliding_window": 64}, "sliding_window=64"),
    "mistral without its window": ("llama", {**MISTRAL, "sliding_window": None}, ""),
    "qwen2": ("qwen2", {**SLIDING, "layer_types": ["sliding_attention"] * 2}, "sliding_window=64"),
    "qwen2, some layers": (
        "qwen2",
        {**SLIDING, "layer_types": ["full_attention", "sliding_attention"]},
        r"sliding_window=64: vLLM's hybrid KV cache manager .* --disable-hybrid-kv-cache-manager"
        r"|windows \(sliding_window=64\) on vLLM 0\.(26|29)",
    ),
    "qwen2 that does not use its window": ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, ""),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_model_with_a_sliding_window_is_refused_by_its_config_where_it_uses_it(
    tiny_model: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    kind, change, says = MODELS[what]
    shape = {"head_dim": 64} if kind == "llama" else {"num_attention_heads": 2}
    shutil.copytree(tiny_model(kind, dtype="bfloat16", **shape), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    config = configured(str(tmp_path / "m"), VllmSettings())
    if not says:
        support.require_config(config)
        return
    with pytest.raises(Unsupported, match=says):
        support.require_config(config)


SMALL = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 4096,
}  # fmt: skip
LATENT = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4}
STATES = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 16}


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("DeepseekV2", {**SMALL, **LATENT, "q_lora_rank": None, "first_k_dense_replace": 2}, "MLA"),
        ("Jamba", {**SMALL, **STATES}, "hybrid"),
        ("Mamba", {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 320}, "without attention"),
    ],
)
def test_a_model_whose_layers_keep_something_else_is_refused_by_its_config(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str, fields: dict[str, Any], says: str
) -> None:
    import transformers

    shutil.copytree(tiny_model("llama", dtype="bfloat16", head_dim=64), tmp_path / "m")
    made = getattr(transformers, f"{kind}Config")(**fields, architectures=[f"{kind}ForCausalLM"], dtype="bfloat16")
    made.save_pretrained(tmp_path / "m")
    with pytest.raises(Unsupported, match=says):
        support.require_config(configured(str(tmp_path / "m"), VllmSettings()))


# --- warned of


@pytest.mark.parametrize("run", [True, False])
def test_a_release_that_was_not_run_is_warned_of_in_the_servers_log(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, run: bool
) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from thaw.engines.served.mailbox import Mailbox
    from thaw.engines.vllm.connector import ThawConnector

    caplog.set_level(logging.WARNING, "thaw")
    if not run:
        monkeypatch.setattr(versions, "RUN", frozenset())
    ThawConnector(configured(folder, VllmSettings(mail=str(tmp_path))), KVConnectorRole.SCHEDULER, full_attention())
    facts = Mailbox(tmp_path).engine_facts()
    assert facts is not None and len(facts.notes) == (0 if run else 1)
    said = [record.getMessage() for record in caplog.records if record.name == "thaw.vllm"]
    assert said == [f"thaw: {note}" for note in facts.notes]


@only("small blocks")
def test_who_joins_an_engine_is_warned_of_what_it_says_of_itself(engine: VllmEngine) -> None:
    mail, facts = engine._transport.mail, engine._transport.facts
    llm = engine._transport._llm  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        thaw.attach(llm).close()
    assert not [one for one in seen if one.category is RuntimeWarning]
    mail.post("s", msgspec.structs.replace(facts, notes=("vLLM 0.99 was not run",)))
    try:
        with pytest.warns(RuntimeWarning, match=r"^vLLM 0\.99 was not run$") as warned:
            thaw.attach(llm).close()
        assert [one.filename for one in warned if one.category is RuntimeWarning] == [__file__]
    finally:
        mail.post("s", facts)
