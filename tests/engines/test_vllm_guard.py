"""Nothing that one request holds ends the engine: vLLM's hooks as the scheduler's side answers them, without a vLLM.
`on_vllm/test_http.py` sends the same messages to a real one. And what the hooks answer where blocks are hidden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thaw.core.errors import InvalidRequest
from thaw.engines.served import protocol
from thaw.engines.served.budget import Room
from thaw.engines.served.mailbox import SCHEDULER, Mailbox
from thaw.engines.served.protocol import EngineFacts
from thaw.engines.vllm import jobs
from thaw.engines.vllm.scheduler.scheduler import SchedulerSide
from thaw.engines.vllm.settings import VllmSettings
from thaw.testing.messages import HOSTILE, MOST_SAID, odd_messages

ONE, TWO, THREE = "1" * 32, "2" * 32, "3" * 32
BLOCKS = 16
FACTS = EngineFacts(
    protocol=protocol.VERSION, thaw="0", version="0", pid=1, model="m", dtype="float32", max_model_len=100,
    max_logprobs=5, block_size=BLOCKS, num_blocks=100, world_size=1, prefix_caching=True, runner="V1", vocab_size=100,
    eos_token_ids=(),
)  # fmt: skip
PLAIN = SimpleNamespace(n=1, structured_outputs=None)
ASKED = SimpleNamespace(n=1, structured_outputs="something")


class Vllm:
    """vLLM's scheduler, as far as the connector sees it: a request goes through all of its hooks. `tables`: the blocks
    that each gets, of every KV cache group."""

    def __init__(self, mail: Path, num_groups: int) -> None:
        self.mail = Mailbox(mail)
        self.side = SchedulerSide(FACTS, VllmSettings(), self.mail, 64, num_groups)
        self.tables = ((1, 2), (3, 4))[:num_groups]
        self.no_tables = ((),) * num_groups
        self._count = 0

    def request(self, message: object, num_tokens: int = 20, **more: Any) -> Any:
        self._count += 1
        found = SimpleNamespace(
            request_id=f"r{self._count}", kv_transfer_params={protocol.KEY: message}, sampling_params=PLAIN,
            all_token_ids=list(range(num_tokens)), num_tokens=num_tokens, cache_salt=None, block_hashes=[],
            update_block_hashes=lambda: None, num_preemptions=0, num_computed_tokens=0, num_in_flight_tokens=0,
            status="RUNNING", use_structured_output=False,
        )  # fmt: skip
        vars(found).update(more)
        return found

    def serve(self, request: Any) -> dict[str, Any]:
        """What its reply carries; what workers were to do is not done."""
        self.side.arrived(request)
        for _ in range(3):
            num_external, _ = self.side.matched(request, 0)
            if num_external is not None:
                self.side.allocated(request, self.tables, num_external)
                break
        failed = [job for job in self.side.queue if isinstance(job, jobs.Fail)]
        self.step(request)
        request.num_computed_tokens = 0 if failed else request.num_tokens
        request.status = "FINISHED_ERROR" if failed else "FINISHED_STOPPED"
        held, reply = self.side.finished(request, self.no_tables if failed else self.tables)
        assert held in (True, False)
        return {} if reply is None else reply[protocol.KEY]

    def step(self, *requests: Any) -> list[Any]:
        new = [SimpleNamespace(req_id=r.request_id, block_ids=self.tables, num_computed_tokens=0) for r in requests]
        cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set())
        scheduled = dict.fromkeys((r.request_id for r in requests), 1)
        output = SimpleNamespace(
            scheduled_new_reqs=new, scheduled_cached_reqs=cached, finished_req_ids=set(), num_scheduled_tokens=scheduled
        )
        return self.side.collect(output)

    def run(self, record: str = TWO, **more: object) -> Any:
        return self.request({"op": "run", "id": f"{self._count:032x}", "record": record, **more})


class Cache:
    """vLLM's block pool: of each hash the block in each group, None where there is none."""

    def __init__(self, found: dict[str, list[int | None]]) -> None:
        self._found = found
        self.blocks = {
            block: SimpleNamespace(block_id=block, block_hash=(name, group))
            for name, blocks in found.items()
            for group, block in enumerate(blocks)
        }

    def get_cached_block(self, block_hash: str, groups: list[int]) -> list[Any] | None:
        found = [self._found[block_hash][group] for group in groups]
        return None if None in found else [self.blocks[block] for block in found]


@pytest.fixture(params=[1, 2], ids=["one group", "two groups"])
def vllm(tmp_path: Path, request: pytest.FixtureRequest) -> Vllm:
    return Vllm(tmp_path / "mail", request.param)


def test_messages_with_odd_fields_cost_themselves_alone(vllm: Vllm) -> None:
    for message in (*HOSTILE.values(), *odd_messages()):
        said = vllm.serve(vllm.request(message))
        assert len(str(said)) <= MOST_SAID
    assert vllm.serve(vllm.run(THREE))["num_kv"] == 19
    assert vllm.side.num_running() == 0 and vllm.side.metrics()["records"] <= 2


def test_an_image_in_a_session_is_refused_by_name_and_plain_requests_may_have_one(vllm: Vllm) -> None:
    image = [SimpleNamespace(modality="image")]
    said = vllm.serve(vllm.request({"op": "run", "id": "f" * 32, "record": TWO}, mm_features=image))
    assert said["kind"] == "unsupported" and said["error"].startswith("image in a request that carries")
    assert vllm.serve(vllm.request({"op": "run", "id": "e" * 32, "record": THREE}, mm_features=[]))["num_kv"] == 19


def test_a_message_with_an_odd_field_is_a_message_or_refused_in_few_words() -> None:
    kinds = set()
    for message in odd_messages():
        try:
            kinds.add(type(protocol.parse({protocol.KEY: message})))
        except InvalidRequest as error:
            assert len(str(error)) <= MOST_SAID and str(error).isascii()
    assert len(kinds) == 10


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "without structured_outputs"),
        ({"sampling_params": ASKED}, "there is no grammar"),
        ({"sampling_params": ASKED, "use_structured_output": True}, "the request has 20 tokens"),
    ],
    ids=["none", "an empty one", "tokens that are not there"],
)
def test_a_grammar_is_there_for_tokens_that_are(vllm: Vllm, more: dict[str, Any], says: str) -> None:
    message = {"op": "run", "id": ONE, "record": TWO, "grammar_from": 21}
    said = vllm.serve(vllm.request(message, **more))
    assert said["kind"] == "invalid-request" and says in said["error"]


def fails(*_: object, **__: object) -> Any:
    raise RuntimeError("nobody foresaw this")


BROKEN: dict[str, Callable[[SchedulerSide], tuple[Any, str]]] = {
    "arriving": lambda side: (side.records, "require_room"),
    "being matched": lambda side: (side._groups, "waits"),
    "being given blocks": lambda side: (side._loads, "in_background"),
    "having a step": lambda side: (side, "_check_own"),
    "a step of all": lambda side: (side._saving, "rescue"),
    "ending": lambda side: (side._saving, "end"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_nobody_foresaw_ends_the_one_request(
    vllm: Vllm, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert vllm.serve(vllm.run())["num_kv"] == 19
    with monkeypatch.context() as patch:
        patch.setattr(*BROKEN[name](vllm.side), fails)
        said = vllm.serve(vllm.run(THREE, source=TWO, num_kv=19))
    assert said["kind"] == "storage-failed" and "nobody foresaw this" in said["error"]
    assert "Traceback" in caplog.text
    assert vllm.side.num_running() == 0
    assert vllm.serve(vllm.run(THREE, source=TWO, num_kv=19))["num_kv"] == 19


def test_a_request_that_fails_while_it_ends_leaves_no_word_of_it_to_the_workers(
    vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has let go of its blocks: told that they were copied, it would look for a request that is gone."""
    request = vllm.run()
    vllm.side.arrived(request)
    assert vllm.side.matched(request, 0) == (0, False)
    vllm.side.allocated(request, vllm.tables, 0)
    vllm.step(request)
    request.num_computed_tokens, request.status = 20, "FINISHED_STOPPED"
    monkeypatch.setattr(vllm.side.records, "touch", fails)
    assert vllm.side.finished(request, vllm.tables)[0] is False
    assert [type(job) for job in vllm.side.queue] == [jobs.Forget] and len(vllm.side.records) == 0


def test_a_command_whose_answer_cannot_be_read_ends(vllm: Vllm) -> None:
    request = vllm.request({"op": "stats", "id": ONE})
    vllm.side.arrived(request)
    vllm.side.queue.clear()  # the workers have it
    (vllm.mail.folder / "answers" / f"{ONE}.{SCHEDULER}").write_bytes(b"{")
    assert vllm.side.matched(request, 0) == (0, False)
    assert vllm.side.finished(request, vllm.no_tables) == (False, None)


@pytest.mark.parametrize("message", [{"op": "stats", "id": ONE, "v": 1}, {"op": "unpin", "id": ONE}])
def test_a_full_disk_below_the_mail_costs_answers_only(vllm: Vllm, message: object) -> None:
    """Here its folder is gone, which an engine that runs as root meets as well."""
    (vllm.mail.folder / "answers").rmdir()
    assert vllm.serve(vllm.request(message))["kind"] == "invalid-request"
    (vllm.mail.folder / "facts").rename(vllm.mail.folder / "away")
    vllm.mail.post_tight(0, {ONE: Room(num_tokens=1, why="x")})


def test_two_messages_of_one_id_do_not_answer_for_each_other(vllm: Vllm) -> None:
    first, second = (vllm.request({"op": "stats", "id": ONE}) for _ in range(2))
    vllm.side.arrived(first)
    assert vllm.serve(second)["kind"] == "invalid-request"
    assert vllm.mail.peek(ONE, SCHEDULER) is None


def test_the_block_of_a_sessions_last_token_is_hidden_until_the_next_one_is_there_in_every_group(vllm: Vllm) -> None:
    """A hydrated session has no KV for its last token. Once siblings have read on, all of them find what they read."""
    assert vllm.serve(vllm.request({"op": "run", "id": ONE, "record": TWO}, 2 * BLOCKS))["num_kv"] == 2 * BLOCKS - 1
    first, others = [table[0] for table in vllm.tables], len(vllm.tables) - 1
    for record, last in ((THREE, None), ("4" * 32, 9)):
        cache = Cache({"a": [*first], "b": [5, 6][: others + 1], "c": [8] * others + [last]})
        vllm.side.bind(cache)
        message = {"op": "run", "id": record, "record": record, "source": TWO, "num_kv": 2 * BLOCKS - 1}
        request = vllm.request(message, 3 * BLOCKS + 2, block_hashes=["a", "b", "c"])
        vllm.side.arrived(request)
        assert vllm.side.matched(request, 2 * BLOCKS) == (None, False) and request.block_hashes == ["a"]
        wanted, _ = vllm.side.matched(request, BLOCKS)
        assert wanted == (BLOCKS - 1 if last is None else None) and request.block_hashes == ["a", "b", "c"]
    assert vllm.side.matched(request, 3 * BLOCKS) == (0, False)
