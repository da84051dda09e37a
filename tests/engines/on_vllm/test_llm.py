"""An offline `LLM` that the user made: thaw's verbs on it, and `llm.generate` between them.

With the engine core in a process of its own, and in this one, where it does nothing unless it is stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw.core.errors import Busy, InvalidRequest
from thaw.engines.base import Engine, SessionRef
from thaw.engines.served.settings import settled
from thaw.engines.vllm.scheduler.content_ids import BlockContents
from thaw.engines.vllm.settings import VllmSettings, engine_args
from thaw.testing.laws.bytes_law import blob_ids
from thaw.testing.laws.kit import Lab, bits, every_knob, greedy, ids, same, seeded
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module", params=["1", "0"], ids=["core-elsewhere", "core-here"])
def llm(model: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    from vllm import LLM

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", request.param)
        made = LLM(str(model), enforce_eager=True, max_model_len=4096, **engine_args(settled(VllmSettings())))
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def engine(llm: Any) -> Iterator[Engine]:
    with thaw.attach(llm) as engine:
        yield engine


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def native(llm: Any, prompt: list[int], count: int = 12) -> list[int]:
    """What vLLM generates by itself."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
    return list(outputs[0].outputs[0].token_ids)


def test_the_users_own_calls_between_verbs(engine: Engine, llm: Any, lab: Lab) -> None:
    prompt = list(ids(300))
    before = native(llm, prompt)
    for _ in range(3):
        session = lab.begin(engine)
        assert list(lab.one(engine, session, greedy(12)).token_ids) == before
        assert native(llm, prompt) == before
        engine.identity()
        assert native(llm, prompt) == before


def test_captured_and_brought_back_in_the_same_engine(engine: Engine, lab: Lab) -> None:
    parent = lab.begin(engine, start=1)
    lab.one(engine, parent, seeded(8))
    child = lab.move(engine, parent, engine)
    same(lab.one(engine, child, every_knob(), ids(4, 2)), lab.one(engine, parent, every_knob(), ids(4, 2)))


def test_children_of_a_fork_run_in_one_batch(engine: Engine, lab: Lab) -> None:
    parent = lab.begin(engine, start=2)
    one = lab.run(engine, *lab.fork(engine, parent, 4), sampling=every_knob())
    two = lab.run(engine, *lab.fork(engine, parent, 4), sampling=every_knob())
    for a, b in zip(one, two, strict=True):
        same(a, b)


def test_captured_while_it_decodes(engine: Engine, lab: Lab) -> None:
    parent = lab.begin(engine, start=3)
    captured, whole = lab.captured_amid(engine, parent)
    rest = lab.resume(engine, lab.hydrate(engine, lab.plan(captured)).session)[0]
    assert rest.token_ids == whole.token_ids
    assert [x.hex() for x in rest.logprobs] == [x.hex() for x in whole.logprobs]


def goes_on_as_captured(engine: Engine, lab: Lab, session: SessionRef) -> bool:
    """Whether the session's next tokens depend on the KV that a capture of it has."""
    moved = lab.move(engine, session, engine)
    live, restored = (lab.one(engine, one, greedy(6)) for one in (session, moved))
    return bits(live.logprobs) == bits(restored.logprobs)


@pytest.mark.all_cores("on one core a batch of another shape has the same bits")
def test_what_siblings_sampled_alike_in_other_batches_is_not_exchanged(
    engine: Engine, lab: Lab, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal tokens, other bits, in a block that decoding filled: a child that ran alone and one that ran among four
    each keep their own. Negative control, where the core is in this process: not asked whose block it is, vLLM gives
    one child's to the other."""
    session = lab.begin(engine, 300, start=4)
    alone, *group = (lab.twin(engine, session) for _ in range(5))
    alike = greedy(100, logit_bias={97: 100.0})
    lab.one(engine, alone, alike)
    lab.run(engine, *group, sampling=alike)
    assert len({engine.view(child).tokens for child in (alone, *group)}) == 1
    assert blob_ids(lab.capture(engine, alone)) != blob_ids(lab.capture(engine, group[0]))
    for child in (alone, *group):
        assert goes_on_as_captured(engine, lab, child)
    if request.node.callspec.params["llm"] == "0":
        monkeypatch.setattr(BlockContents, "hits_foreign", lambda *_: False)
        assert not all(goes_on_as_captured(engine, lab, child) for child in (alone, *group))


@pytest.mark.all_cores("on one core a batch of another shape has the same bits")
def test_a_sibling_right_after_another_goes_on_from_its_own(engine: Engine, lab: Lab) -> None:
    """What was found for one session a moment ago is not taken for the next one's: same tokens, other bits."""
    session = lab.begin(engine, 300, start=8)
    alone, *group = (lab.twin(engine, session) for _ in range(5))
    alike = greedy(100, logit_bias={97: 100.0})
    lab.one(engine, alone, alike)
    lab.run(engine, *group, sampling=alike)
    siblings = (alone, group[0])
    captured = [lab.move(engine, one, engine) for one in siblings]
    live = [lab.one(engine, one, greedy(6)) for one in siblings]
    for one, other in zip(live, captured, strict=True):
        same(one, lab.one(engine, other, greedy(6)))


def test_aborted_it_goes_on(engine: Engine, llm: Any, lab: Lab) -> None:
    session, _, whole = lab.stopped_amid(engine, lab.begin(engine, start=6))
    assert len(native(llm, list(ids(20)))) == 12
    rest = lab.resume(engine, session)[0]
    assert rest.token_ids == whole.token_ids


def test_refused_while_the_users_own_requests_run(engine: Engine, llm: Any, lab: Lab) -> None:
    from vllm import SamplingParams

    llm.llm_engine.add_request("mine", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=4, ignore_eos=True))
    with pytest.raises(Busy, match=r"llm\.generate is running"):
        lab.begin(engine)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    lab.begin(engine)


def test_closing_leaves_the_llm_running(llm: Any, lab: Lab) -> None:
    with thaw.attach(llm) as engine:
        lab.begin(engine)
    assert len(native(llm, list(ids(20)))) == 12


def test_what_cannot_be_attached(llm: Any) -> None:
    with pytest.raises(InvalidRequest, match="none of"):
        thaw.attach(7)
    with pytest.raises(InvalidRequest, match="api_key"):
        thaw.attach(llm, api_key="x")
    with pytest.raises(InvalidRequest, match="tokenizer"):
        thaw.attach(llm, tokenizer=object())
