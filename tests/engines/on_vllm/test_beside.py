"""Beside another connector in vLLM's own `MultiConnector`: vLLM's `ExampleConnector`, which saves every prompt's blocks
in a folder and finds them by their tokens alone.

Sessions are what they are without it, bit for bit. What the other one loads was computed for somebody else: thaw's
own KV goes before it, and a session for which it has loaded tokens is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_http import Server
from test_operators import Owner

import thaw
from thaw.core.errors import InvalidRequest, Unsupported
from thaw.data.locations import StoreMount
from thaw.engines import load_engine
from thaw.engines.base import Completion, Engine
from thaw.engines.vllm.settings import VllmSettings
from thaw.testing.laws.kit import LIMIT_S, Lab, bits, every_knob, greedy, ids, same, seeded
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    mount: StoreMount = mount_at(tmp_path_factory.mktemp("packs"))
    return Lab(mount)


def story(engine: Engine, lab: Lab) -> list[Completion]:
    """A session that answers, four children of it, and one hydrated from a capture during another answer."""
    parent = lab.begin(engine, 500, start=3)
    captured, whole = lab.captured_amid(engine, parent)
    said = lab.one(engine, parent, seeded(200))
    kids = lab.run(engine, *lab.fork(engine, parent, 4), sampling=every_knob(), prompt=ids(5, 1))
    hydrated = lab.hydrate(engine, lab.plan(captured))
    assert hydrated.proof.num_cached_tokens == captured.num_kv > 500
    rest = lab.resume(engine, hydrated.session)[0]
    assert rest.token_ids == whole.token_ids and bits(rest.logprobs) == bits(whole.logprobs)
    return [said, *kids]


@pytest.fixture(scope="module")
def alone(model: Path, lab: Lab) -> list[Completion]:
    with load_engine("vllm", model=str(model), enforce_eager=True, max_model_len=4096) as engine:
        return story(engine, lab)


def example(folder: Path) -> dict[str, object]:
    extra = {"shared_storage_path": str(folder)}
    return {"kv_connector": "ExampleConnector", "kv_connector_extra_config": extra}


@pytest.fixture(scope="module")
def engine(model: Path, alone: list[Completion], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    beside = [example(tmp_path_factory.mktemp("others"))]
    with load_engine("vllm", model=str(model), enforce_eager=True, max_model_len=4096, beside=beside) as booted:
        yield booted


def test_sessions_are_captured_hydrated_and_forked_as_without_it(
    engine: Engine, alone: list[Completion], lab: Lab
) -> None:
    for one, two in zip(story(engine, lab), alone, strict=True):
        same(one, two)


def test_the_other_connector_is_there_and_serves_plain_requests(engine: Engine) -> None:
    owner = Owner(engine)  # type: ignore[arg-type]
    tokens = ids(400, 70)
    first = owner.plain(tokens)
    assert owner("reset_prefix_cache") is True
    again = owner.plain(tokens)
    assert first.num_cached_tokens == 0 and again.num_cached_tokens == 384, "loaded by the other connector"


def test_what_another_connector_loaded_for_a_session_is_refused(engine: Engine, lab: Lab) -> None:
    """It holds this prompt from a plain request. The session stays as it was, and the engine goes on."""
    tokens = ids(400, 71)
    Owner(engine).plain(tokens)  # type: ignore[arg-type]
    session = engine.open(seed=1)
    with pytest.raises(Unsupported, match=r"another connector .* loaded 384 tokens"):
        engine.append(session, tokens).result(LIMIT_S)
    assert engine.view(session).num_kv == 0
    shared = engine.open(seed=1, share_prefix=True)
    assert engine.append(shared, tokens).result(LIMIT_S).num_kv >= 399, "who shares with everybody takes it"
    assert len(lab.one(engine, lab.begin(engine, 300, start=72), greedy(4)).token_ids) == 4
    assert engine.stats()["running"] == 0  # type: ignore[attr-defined]


def test_a_sessions_own_kv_goes_before_what_the_other_one_holds(engine: Engine, lab: Lab) -> None:
    """The other connector saved the session's own prompt, too, when it was read."""
    session = lab.begin(engine, 400, start=73)
    expected = lab.one(engine, lab.twin(engine, session), seeded(12))
    assert Owner(engine)("reset_prefix_cache") is True  # type: ignore[arg-type]
    again = lab.one(engine, session, seeded(12))
    same(expected, again)
    assert again.num_cached_tokens >= 399


def test_what_is_no_connector_is_refused_before_anything_starts(model: Path) -> None:
    for wrong in ("ThawConnector", {"kv_role": "kv_both"}):
        with pytest.raises(InvalidRequest, match="beside thaw"):
            load_engine("vllm", model=str(model), beside=[wrong])


def test_a_server_counts_thaws_work_in_its_own_metrics(
    engine: Engine, model: Path, lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The last test: the engine above makes room. `MultiConnector` asks each connector for its own counts."""
    engine.close()
    folder = tmp_path_factory.mktemp("server")
    beside = [example(folder / "others")]
    server = Server(model, folder, "--max-model-len", "4096", settings=VllmSettings(), beside=beside)
    try:
        with thaw.attach(server.url) as joined:
            story(joined, lab)
            counted = server.metrics()
        assert counted["thaw_captures_total"] >= 1 and counted["thaw_hydrates_total"] == 1
        assert counted["thaw_forks_total"] >= 4 and counted["thaw_loaded_tokens_total"] > 0
        assert counted["thaw_records"] >= 1 and counted["thaw_arena_nbytes"] > 0
    finally:
        server.stop()
