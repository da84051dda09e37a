"""Several engines as one: the two ranks of a real data-parallel server, and a list with another server in it.

Sessions are spread; each stays where its KV is, with its forks; a commit goes on in any of them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_http import Server

import thaw
from thaw.core.errors import EngineDied, InvalidRequest, NotFound, Unsupported
from thaw.engines import load_engine
from thaw.testing.laws.kit import LIMIT_S, Lab, bits, every_knob, greedy, ids, same, seeded, wait_for
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")

from thaw.engines.vllm.client.fleet import DataParallelEngine

SMALL = ("--kv-cache-memory-bytes", str(256 << 20))
"""Three engines at once, on a small machine."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(mount_at(tmp_path_factory.mktemp("packs")))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        model, tmp_path_factory.mktemp("ranks"), "--max-model-len", "4096", *SMALL, "--data-parallel-size", "2",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fleet(server: Server) -> Iterator[DataParallelEngine]:
    with thaw.attach(server.url) as engine:
        assert isinstance(engine, DataParallelEngine)
        yield engine


def places(fleet: DataParallelEngine, *sessions: object) -> list[int]:
    """In which of the engines each session lives."""
    members = list(fleet.members)
    return [members.index(fleet._of(session)) for session in sessions]  # type: ignore[arg-type]


def test_both_ranks_are_there_each_with_mail_of_its_own(fleet: DataParallelEngine, server: Server) -> None:
    assert sorted(member._transport.facts.data_parallel_rank for member in fleet.members) == [0, 1]
    assert len({member._transport.facts.pid for member in fleet.members}) == 2
    assert fleet.options["url"] == server.url


def test_sessions_are_spread_and_stay_with_their_forks(fleet: DataParallelEngine, lab: Lab) -> None:
    sessions = [lab.begin(fleet, 200, start=i) for i in range(4)]
    assert sorted(places(fleet, *sessions)) == [0, 0, 1, 1]
    for session in sessions:
        kids = lab.fork(fleet, session, 2)
        assert set(places(fleet, *kids)) == set(places(fleet, session))
        assert fleet.view(kids[0]).tokens == fleet.view(session).tokens
        for kid in (session, *kids):
            fleet.close_session(kid)
    with pytest.raises(NotFound, match="not open in any"):
        fleet.view(sessions[0])


def test_what_one_rank_committed_goes_on_in_the_other_bit_for_bit(fleet: DataParallelEngine, lab: Lab) -> None:
    parent = lab.begin(fleet, 400, start=5)
    captured, whole = lab.captured_amid(fleet, parent)
    plan = lab.plan(captured)
    found = [lab.hydrate(fleet, plan) for _ in range(2)]
    assert {*places(fleet, *(one.session for one in found))} == {0, 1}
    for one in found:
        assert one.proof.num_cached_tokens == captured.num_kv
        rest = lab.resume(fleet, one.session)[0]
        assert rest.token_ids == whole.token_ids and bits(rest.logprobs) == bits(whole.logprobs)
        fleet.close_session(one.session)
    fleet.close_session(parent)


def test_one_call_over_sessions_of_both_ranks_brings_all_in_order(fleet: DataParallelEngine, lab: Lab) -> None:
    sessions = [lab.begin(fleet, 200, start=20 + i) for i in range(4)]
    expected = [lab.one(fleet, lab.twin(fleet, session), every_knob(), ids(3, i)) for i, session in enumerate(sessions)]
    handle = lab.start(fleet, *sessions, sampling=greedy(20))
    told: dict[int, list[int]] = {}
    for delta in handle:
        assert delta.session == sessions[delta.index]
        told.setdefault(delta.index, []).extend(delta.token_ids)
    for index, out in enumerate(handle.result(LIMIT_S)):
        assert out.session == sessions[index] and tuple(told[index]) == out.token_ids
    assert len(expected) == 4
    cut = lab.start(fleet, *sessions, sampling=greedy(3000))
    wait_for(cut, 4)
    cut.cancel()
    assert [out.finish_reason for out in cut.result(LIMIT_S)] == ["abort"] * 4
    for session in sessions:
        fleet.close_session(session)


def test_what_concerns_all_reaches_all(fleet: DataParallelEngine, lab: Lab) -> None:
    sessions = [lab.begin(fleet, 200, start=30 + i) for i in range(2)]
    assert fleet.stats()["records"] >= 2 and sorted(places(fleet, *sessions)) == [0, 1]
    fleet.switch(on=False)
    for session in sessions:
        with pytest.raises(InvalidRequest, match="switched off"):
            lab.one(fleet, session, greedy(1))
    fleet.switch(on=True)
    for session in sessions:
        assert fleet.pin(session, 60).result(LIMIT_S) == 128
    with fleet.policy("7"):
        assert fleet.stats()["pinned_blocks"] == 0
        assert all(member.policy_version == "7" for member in fleet.members)
    for session in sessions:
        fleet.close_session(session)


def test_a_program_with_ranks_of_its_own_is_refused_by_name(model: Path) -> None:
    with pytest.raises(Unsupported, match="data_parallel_size=2"):
        load_engine("vllm", model=str(model), data_parallel_size=2)


def test_a_list_of_servers_and_one_of_them_dies(
    server: Server, fleet: DataParallelEngine, model: Path, lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The last test: the first server ends. Sessions of the other one go on, and new ones begin there."""
    second = Server(model, tmp_path_factory.mktemp("second"), "--max-model-len", "2048", *SMALL)
    try:
        with thaw.attach([server.url, second.url]) as three:
            assert isinstance(three, DataParallelEngine) and len(three.members) == 3
            assert three.info.max_model_len == 2048
            assert three.options["url"] == f"{server.url},{second.url}"
            sessions = [lab.begin(three, 200, start=40 + i) for i in range(3)]
            assert sorted(places(three, *sessions)) == [0, 1, 2]
            plans = [lab.plan(lab.capture(three, session)) for session in sessions]
            expected = [lab.one(three, lab.twin(three, session), seeded(8)) for session in sessions]
            server.stop()
            for session, plan, out in zip(sessions, plans, expected, strict=True):
                if three.home(session) == second.url:
                    same(lab.one(three, session, seeded(8)), out)
                    continue
                with pytest.raises(EngineDied, match=server.url):
                    lab.one(three, session, seeded(8))
                again = lab.hydrate(three, plan).session
                assert three.home(again) == second.url
                same(lab.one(three, again, seeded(8)), out)
    finally:
        second.stop()
