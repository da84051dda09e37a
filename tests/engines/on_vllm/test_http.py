"""Over HTTP: a stock OpenAI server in a process of its own, started with the one file, and thaw's verbs on it.

What a session brings over HTTP must be what it brings in process, bit for bit, when it runs in a batch of equal shape.
One server serves the tests; the last of them stops it. Then the law book, on servers of its own.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

import thaw
import warm
from light_client import HEAVY, light_client
from thaw.core.errors import Cancelled, EngineDied, InvalidRequest, NotFound
from thaw.core.sampling import Sampling
from thaw.data.locations import StoreMount
from thaw.engines import load_engine
from thaw.engines.base import Completion, Engine, GenerateRequest, HydratePlan, SessionRef
from thaw.engines.served import protocol
from thaw.engines.served.budget import MAX_COMMANDS
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.vllm.client.http import VllmHttpTransport
from thaw.engines.vllm.settings import Other, VllmSettings, config_file, server_command
from thaw.testing import EngineTests
from thaw.testing.laws.kit import LIMIT_S, Lab, every_knob, greedy, ids, same, seeded, until, wait_for
from thaw.testing.messages import HOSTILE, MALFORMED, MOST_SAID, UNFIT, odd_messages
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")
KEY = "sesame"
START_LIMIT_S = 300.0
SHARED = VllmSettings(caller_fraction=0.05, guest_fraction=0.001, spill_nbytes=1 << 30)
GUESTS_NBYTES = int(SHARED.arena_nbytes * 0.001) + int(SHARED.spill_nbytes * 0.001)


class Server:
    """`python -m vllm.entrypoints.openai.api_server`, as an operator starts it."""

    def __init__(
        self, model: Path, folder: Path, *options: str, settings: VllmSettings | None = None,
        beside: Sequence[Other] = (), **environment: str,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "thaw.yaml"
        settings = msgspec.structs.replace(settings or VllmSettings(), mail=str(folder / "mail"))
        config.write_text(config_file(settings, beside), encoding="utf-8")
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        command = server_command(str(model), config, port, python=sys.executable)
        with self.log.open("wb") as log:
            self._process = warm.popen(
                [*command, "--host", "127.0.0.1", "--enforce-eager", *options],
                stdout=log, stderr=log, start_new_session=True, env={**os.environ, **environment},
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        ends = time.monotonic() + START_LIMIT_S
        while time.monotonic() < ends:
            assert self._process.poll() is None, f"the server ended:\n{self.log.read_text()[-4000:]}"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def collective_rpc(self, method: str, **kwargs: object) -> None:
        """The server's own way to its workers, there in its development mode."""
        body = json.dumps({"method": method, "kwargs": kwargs}).encode()
        asked = urllib.request.Request(f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as reply:
            assert reply.status == 200

    def metrics(self, prefix: str = "vllm:") -> dict[str, float]:
        """What the server's own /metrics count, by name, summed over labels."""
        found: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(prefix):
                    name = line.partition("{")[0].removeprefix(prefix)
                    found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
        return found

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def stop(self, *signs: int) -> None:
        """End it and all that it started."""
        for sign in signs or (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sign)
            except ProcessLookupError:
                return
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                continue


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> StoreMount:
    return mount_at(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def lab(mount: StoreMount) -> Lab:
    return Lab(mount)


def numbered(count: int) -> Sampling:
    """An answer of two letters and `count` numbers, by a grammar."""
    regex = f"[a-d]{{2}}(-[0-9]{{3}}){{{count}}}"
    return Sampling(max_tokens=4 * count + 40, seed=5, structured_outputs={"regex": regex})  # type: ignore[arg-type]


GRAMMAR = numbered(40)
SAMPLINGS = (greedy(12, logprobs=5), seeded(12, logprobs=2), every_knob(), GRAMMAR)


def story(engine: Engine, lab: Lab) -> list[Completion]:
    """What is compared: one session with each kind of sampling, and four children in one batch."""
    out = [lab.one(engine, lab.begin(engine, start=i), sampling) for i, sampling in enumerate(SAMPLINGS)]
    parent = lab.begin(engine, start=9)
    children = lab.fork(engine, parent, 4)
    return [*out, *lab.run(engine, *children, sampling=every_knob(), prompt=ids(5, 1))]


class InProcess:
    """What an engine in process said, and a session that it left behind."""

    def __init__(self, model: Path, lab: Lab) -> None:
        with booted(model) as engine:
            self.story = story(engine, lab)
            parent = lab.begin(engine, start=4)
            lab.one(engine, parent, seeded(8))
            self.plan: HydratePlan = lab.plan(lab.capture(engine, parent))
            self.rest = lab.one(engine, parent, every_knob(), ids(3, 2))


def booted(model: Path) -> Engine:
    return load_engine("vllm", model=str(model), enforce_eager=True, max_model_len=4096)


@pytest.fixture(scope="module")
def in_process(model: Path, lab: Lab) -> InProcess:
    return InProcess(model, lab)


@pytest.fixture(scope="module")
def server(model: Path, in_process: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started when the engine in process is gone: two at once crowd a small machine."""
    folder = tmp_path_factory.mktemp("server")
    server = Server(
        model, folder, "--max-model-len", "4096", "--api-key", KEY, settings=SHARED, VLLM_LOGGING_LEVEL="WARNING"
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def engine(server: Server) -> Iterator[Engine]:
    with thaw.attach(server.url, api_key=KEY) as engine:
        yield engine


def test_tokens_and_logprobs_are_those_of_the_engine_in_process(
    engine: Engine, lab: Lab, in_process: InProcess
) -> None:
    for over_http, direct in zip(story(engine, lab), in_process.story, strict=True):
        same(over_http, direct)
        assert over_http.usage == direct.usage


def test_the_model_is_the_same_one(engine: Engine, in_process: InProcess) -> None:
    assert engine.identity() == in_process.plan.identity


def test_a_client_loads_neither_torch_nor_transformers(engine: Engine, server: Server, tmp_path: Path) -> None:
    """Nor does it where it commits and brings back, once the identity of the model's files was said on this machine."""
    engine.identity()
    found = light_client(server.url, KEY, tmp_path / "repo")
    assert HEAVY.isdisjoint(found["loaded"]) and found["restored"] > 0
    assert found["joined_s"] <= 1.0, found


def test_a_session_of_the_engine_in_process_goes_on_over_http(engine: Engine, lab: Lab, in_process: InProcess) -> None:
    hydrated = lab.hydrate(engine, in_process.plan)
    assert hydrated.proof.num_cached_tokens == in_process.plan.num_kv
    same(lab.one(engine, hydrated.session, every_knob(), ids(3, 2)), in_process.rest)


def shuffled(engine: Engine, lab: Lab, parent: SessionRef, rounds: int = 8) -> int:
    """How many of these batches of 24 came to the engine in another order than that of their rows."""
    before = engine.stats()["shuffled_groups"]  # type: ignore[attr-defined]
    for _ in range(rounds):
        children = lab.fork(engine, parent, 24)
        lab.run(engine, *children, sampling=seeded(1), prompt=ids(3, 2))
        for child in children:
            engine.close_session(child)
    return int(engine.stats()["shuffled_groups"] - before)  # type: ignore[attr-defined]


@pytest.mark.all_cores("its control needs the server's processes to run at the same time")
def test_a_batch_has_its_rows_in_order_though_each_comes_over_a_connection_of_its_own(
    engine: Engine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = lab.begin(engine, 600)
    assert shuffled(engine, lab, parent) == 0

    async def at_once(*_: object) -> None:
        return

    monkeypatch.setattr(VllmHttpTransport, "_in_turn", at_once)
    assert shuffled(engine, lab, parent) > 0, "sent all at once, some come in another order"


def test_captured_while_it_decodes_it_goes_on_as_if_nothing_had_been(engine: Engine, lab: Lab) -> None:
    parent = lab.begin(engine, start=5)
    captured, whole = lab.captured_amid(engine, parent, after=20)
    child = lab.hydrate(engine, lab.plan(captured)).session
    rest = lab.resume(engine, child)[0]
    assert rest.token_ids == whole.token_ids
    assert [x.hex() for x in rest.logprobs] == [x.hex() for x in whole.logprobs]


def test_structured_output_goes_on_in_its_middle(engine: Engine, lab: Lab) -> None:
    samplings = [numbered(count) for count in (40, 160, 480)]
    session, _, whole = lab.stopped_amid(engine, lab.begin(engine, start=15), samplings=samplings)
    same_tokens(lab.resume(engine, session)[0], whole)
    assert re.fullmatch("[a-d]{2}(-[0-9]{3})+", whole.text)
    assert len(whole.text) in {len("ab") + 4 * count for count in (40, 160, 480)}


def test_an_aborted_session_stops_and_goes_on(engine: Engine, lab: Lab) -> None:
    session, _, whole = lab.stopped_amid(engine, lab.begin(engine, start=6))
    same_tokens(lab.resume(engine, session)[0], whole)


def same_tokens(one: Completion, two: Completion) -> None:
    assert one.token_ids == two.token_ids
    assert [x.hex() for x in one.logprobs] == [x.hex() for x in two.logprobs]


def test_cancelled_before_the_server_has_it(engine: Engine, lab: Lab) -> None:
    session = engine.open(seed=1)
    handle = engine.append(session, ids(3500, 7))
    while not engine.view(session).running:
        time.sleep(0.0005)
    handle.cancel()
    with pytest.raises(Cancelled):
        handle.result(LIMIT_S)
    assert not engine.view(session).running
    read = len(engine.view(session).tokens)
    assert read < 3500
    after = engine.append(session, ids(3500, 7)[read:]).result(LIMIT_S)
    assert after.tokens == ids(3500, 7) and after.num_kv >= 3499


def test_commands_leave_no_request_behind(engine: Engine, server: Server, lab: Lab) -> None:
    session = lab.begin(engine)
    began = time.monotonic()
    for _ in range(10):
        engine.identity()
    assert time.monotonic() - began < 10.0
    assert engine.pin(session, 5.0).result(LIMIT_S) > 0  # type: ignore[attr-defined]
    assert engine.pin(session, 0.0).result(LIMIT_S) == 0  # type: ignore[attr-defined]
    ends = time.monotonic() + 10.0
    while requests_in(server) and time.monotonic() < ends:
        time.sleep(0.05)
    assert requests_in(server) == 0


def requests_in(server: Server) -> float:
    """Requests that the server's own metrics count as running or waiting."""
    counted = server.metrics()
    return counted["num_requests_running"] + counted["num_requests_waiting"]


def test_the_servers_own_metrics_count_what_thaw_does(engine: Engine, server: Server, lab: Lab) -> None:
    before = server.metrics()
    parent = lab.begin(engine, 400, start=20)
    lab.hydrate(engine, lab.plan(lab.capture(engine, parent)))
    lab.run(engine, *lab.fork(engine, parent, 2), sampling=greedy(2))
    with pytest.raises(InvalidRequest):
        lab.one(engine, parent, greedy(2, logprobs=101))
    engine.identity()  # one more step, which brings what the last one has counted
    after = server.metrics()

    def more(name: str) -> float:
        return after[f"thaw_{name}"] - before.get(f"thaw_{name}", 0.0)

    assert (more("captures_total"), more("hydrates_total")) == (1, 1)
    assert more("forks_total") >= 2 and more("loaded_tokens_total") >= 399
    assert after["thaw_records"] == engine.stats()["records"]  # type: ignore[attr-defined]
    assert after["thaw_arena_nbytes"] == engine.stats()["arena_nbytes"] > 0  # type: ignore[attr-defined]


def complete(server: Server, message: object, **more: object) -> tuple[int, dict[str, Any]]:
    """A request as anybody may send it, with this for thaw's message: the reply's status and body, or of a stream the
    first event."""
    body = {"prompt": list(ids(20)), "max_tokens": 1, "kv_transfer_params": {protocol.KEY: message}, **more}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    asked = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=LIMIT_S) as reply:
            return reply.status, json.loads(reply.readline().removeprefix(b"data: "))
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_path_comes_from_a_request_and_what_is_wrong_costs_itself_alone(
    engine: Engine, server: Server, lab: Lab, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """The reply says why, and so does the log where the engine refused it."""
    session = lab.begin(engine, 20)
    everything = tmp_path_factory.getbasetemp()
    refused = engine.stats()["refused"]  # type: ignore[attr-defined]
    files = set(everything.rglob("*"))
    status, reply = complete(server, HOSTILE[name])
    assert status in (400, 404), reply
    why = reply["error"]["message"]
    assert set(everything.rglob("*")) == files, "nothing is made or taken away, whatever the message names"
    assert len(why) <= MOST_SAID
    at_the_door = name in MALFORMED | UNFIT
    if at_the_door:
        assert "protocol" in why or f"kv_transfer_params.{protocol.KEY}: " in why
    else:
        assert reply["error"]["type"] in ("invalid-request", "not-found") and why in server.log.read_text()
    assert engine.stats()["refused"] == refused + (not at_the_door)  # type: ignore[attr-defined]
    same(lab.one(engine, session, greedy(2)), lab.one(engine, lab.begin(engine, 20), greedy(2)))
    assert requests_in(server) == 0


def test_messages_with_odd_fields_are_answered_in_words_and_the_engine_lives(
    engine: Engine, server: Server, lab: Lab
) -> None:
    session = lab.begin(engine, 20)
    grammars = {"structured_outputs": {"choice": ["a", "b"]}}
    asked = [(message, {}) for message in odd_messages()]
    asked += [(message, grammars) for message in odd_messages() if "grammar_from" in message]
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda each: complete(server, each[0], **each[1]), asked))
    for (message, _), (status, reply) in zip(asked, replies, strict=True):
        assert status in (200, 400, 404, 429), (message, reply)
        assert status == 200 or len(reply["error"]["message"]) <= MOST_SAID
    assert {status for status, _ in replies} >= {200, 400}
    same(lab.one(engine, session, greedy(2)), lab.one(engine, lab.begin(engine, 20), greedy(2)))
    assert requests_in(server) == 0 and engine.stats()["running"] == 0  # type: ignore[attr-defined]


def test_of_ten_commands_with_one_id_each_is_answered(server: Server) -> None:
    message = {"op": "look", "id": "7" * 32, "digest": True}
    with ThreadPoolExecutor(10) as threads:
        replies = list(threads.map(lambda _: complete(server, message), range(10)))
    refused = [reply["error"] for status, reply in replies if status != 200]
    assert len(refused) < 10
    assert all(said["code"] in (400, 429) and said["type"] in ("invalid-request", "busy") for said in refused)


def test_a_stream_that_is_refused_says_why_as_well(server: Server) -> None:
    status, event = complete(server, HOSTILE["a record that was guessed"], stream=True)
    assert status == 200, "vLLM has begun its reply by then"
    assert event["error"]["type"] == "not-found" and event["error"]["code"] == 404
    assert "has let go of this session" in event["error"]["message"]


def test_a_failure_that_is_none_of_thaws_stays_as_it_is(server: Server) -> None:
    """A body that only looks like one with a message passes through, and so does what vLLM itself refuses."""
    status, reply = complete(server, None, user='"thaw"')
    assert status == 200 and reply["choices"]
    status, reply = complete(server, None, user='"thaw"', temperature=-1.0)
    assert status == 400 and "temperature" in reply["error"]["message"]


def guest(name: int, **more: object) -> dict[str, Any]:
    return {"op": "run", "id": f"{name + 7000:032x}", "record": f"{name:032x}", **more}


def test_who_has_the_api_key_alone_keeps_no_more_than_the_guests_part(engine: Engine, server: Server, lab: Lab) -> None:
    session = lab.begin(engine, 300)
    before = engine.stats()["arena_nbytes"]  # type: ignore[attr-defined]
    outcomes = [complete(server, guest(i), prompt=list(ids(1000, i))) for i in range(12)]
    status, reply = outcomes[-1]
    assert outcomes[0][0] == 200 and status == 429
    for what in ("arena: ", "spill: ", "do not share the engine's mail folder", "guest_fraction 0.001"):
        assert what in reply["error"]["message"]
    kept = engine.stats()["arena_nbytes"] - before  # type: ignore[attr-defined]
    assert GUESTS_NBYTES // 2 < kept <= GUESTS_NBYTES
    same(lab.one(engine, session, greedy(2)), lab.one(engine, lab.begin(engine, 300), greedy(2)))
    assert lab.capture(engine, session).num_kv > 300
    drop = [f"{i:032x}" for i in range(12)]
    assert complete(server, {"op": "stats", "id": "e" * 32, "drop": drop})[0] == 200
    assert engine.stats()["arena_nbytes"] < before + GUESTS_NBYTES // 4  # type: ignore[attr-defined]
    assert complete(server, guest(50), prompt=list(ids(1000, 50)))[0] == 200
    complete(server, {"op": "stats", "id": "f" * 32, "drop": [guest(50)["record"]]})


def test_commands_that_are_held_are_counted_by_caller(engine: Engine, server: Server) -> None:
    """Here `caller_fraction` lets a caller have 51 of them at once."""
    name = "9" * 32
    Mailbox(server.log.parent / "mail").add_caller(name)
    limit = int(MAX_COMMANDS * 0.05)
    body = {"prompt": [0], "max_tokens": 1}
    held = []
    for i in range(limit):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        message = {"op": "stats", "id": f"{i:032x}", "caller": name}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        asked = {**body, "kv_transfer_params": {protocol.KEY: message}}
        connection.request("POST", "/v1/completions", json.dumps(asked), headers)
        held.append(connection)
    try:
        until(lambda: engine.stats()["commands"] >= limit)  # type: ignore[attr-defined]
        status, reply = complete(server, {"op": "stats", "id": "d" * 32, "caller": name, "inband": True})
        assert status == 429 and "held commands: this caller has 51 of 51" in reply["error"]["message"]
        assert engine.stats()["records"] >= 0  # type: ignore[attr-defined]
    finally:
        for connection in held:
            connection.close()
    until(lambda: engine.stats()["commands"] == 0)  # type: ignore[attr-defined]
    assert complete(server, {"op": "stats", "id": "c" * 32, "caller": name, "inband": True})[0] == 200


def test_a_command_whose_sender_hangs_up_does_not_take_the_engine_with_it(engine: Engine, server: Server) -> None:
    for i in range(20):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        message = {"op": "look", "id": f"{i:032x}", "digest": True}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        body = {"prompt": [0], "max_tokens": 1, "kv_transfer_params": {protocol.KEY: message}}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        time.sleep(0.003 * i)
        connection.close()
    until(lambda: engine.stats()["commands"] == 0)  # type: ignore[attr-defined]


def test_two_clients_do_not_see_each_others_sessions(engine: Engine, server: Server, lab: Lab) -> None:
    session = lab.begin(engine)
    with thaw.attach(server.url + "/v1/", api_key=KEY) as another:
        with pytest.raises(NotFound):
            another.view(session)
        same(lab.one(another, lab.begin(another), greedy()), lab.one(engine, lab.begin(engine), greedy()))


@pytest.mark.parametrize(
    "message",
    [
        protocol.Switch(id="a" * 32, inband=True, on=False),
        protocol.Switch(id="b" * 32, inband=True, on=True, watch_weights=False),
        protocol.Unpin(id="c" * 32, inband=True),
    ],
    ids=["off", "no guard", "unpin"],
)
def test_the_api_key_alone_does_not_change_what_is_everybodys(
    engine: Engine, server: Server, lab: Lab, message: protocol.Message
) -> None:
    """The control: thaw's client, which shares the mail folder, asks for the same and gets it."""
    session = lab.begin(engine, 300, start=33)
    assert engine.pin(session, 60).result(LIMIT_S) == 256  # type: ignore[attr-defined]
    status, reply = complete(server, msgspec.to_builtins(message))
    said = reply["error"]
    assert status == 400 and said["type"] == "invalid-request" and "share the engine's mail folder" in said["message"]
    assert engine.stats()["pinned_blocks"] == 2  # type: ignore[attr-defined]
    engine.release_pins()  # type: ignore[attr-defined]
    assert engine.stats()["pinned_blocks"] == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_wrong_api_key_is_named(server: Server, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(InvalidRequest, match="API key"):
        thaw.attach(server.url, api_key=key)


def test_nobody_there() -> None:
    with pytest.raises(NotFound, match=r"no server at http://127\.0\.0\.1:9 "):
        thaw.attach("http://127.0.0.1:9")


def test_what_is_no_address() -> None:
    with pytest.raises(InvalidRequest, match="not the address"):
        thaw.attach("localhost:8000")
    with pytest.raises(InvalidRequest, match="no list of addresses"):
        thaw.attach([])
    with pytest.raises(InvalidRequest, match="no list of addresses"):
        thaw.attach(["http://127.0.0.1:9", 3])


def test_a_mail_folder_that_is_not_here(engine: Engine, server: Server) -> None:
    folder = server.log.parent / "mail"
    away = folder.with_name("away")
    folder.rename(away)
    try:
        with pytest.raises(NotFound, match="share that folder"):
            thaw.attach(server.url, api_key=KEY)
    finally:
        away.rename(folder)


def test_a_server_that_dies_is_named_and_its_commits_live_on(
    engine: Engine, server: Server, lab: Lab, model: Path
) -> None:
    """The last test with this server: it stops it."""
    parent = lab.begin(engine, start=8)
    lab.one(engine, parent, seeded(8))
    plan = lab.plan(lab.capture(engine, parent))
    rest = lab.one(engine, parent, every_knob(), ids(3, 3))
    many = [parent, *(lab.twin(engine, parent) for _ in range(7))]  # more than can be on its way to the client
    running = lab.start(engine, *many, sampling=Sampling(max_tokens=3000, ignore_eos=True, temperature=0.0))
    wait_for(running, 3)
    server.kill()
    with pytest.raises(EngineDied, match=server.url):
        running.result(LIMIT_S)
    with pytest.raises(EngineDied, match=server.url):
        engine.generate([GenerateRequest(session=engine.open(), prompt=(1,), sampling=greedy())]).result(LIMIT_S)
    with booted(model) as direct:
        same(lab.one(direct, lab.hydrate(direct, plan).session, every_knob(), ids(3, 3)), rest)


class TestVllmHttp(EngineTests):
    """The law book, each engine a server of its own."""

    changes_weights = True
    other_weights: ClassVar[Path]
    servers: ClassVar[dict[Engine, Server]]

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(
        cls, model: Path, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Callable[..., Engine]]:
        cls.other_weights = tiny_model("llama", dtype="bfloat16", head_dim=64, seed=1)
        cls.servers = {}

        def start(*, policy: str = "0", max_model_len: int = 4096) -> Engine:
            folder = tmp_path_factory.mktemp("server")
            server = Server(model, folder, "--max-model-len", str(max_model_len), VLLM_SERVER_DEV_MODE="1")
            engine = thaw.attach(server.url, policy=policy)
            close = engine.close

            def close_both() -> None:
                close()
                server.stop()

            engine.close = close_both  # type: ignore[method-assign]
            cls.servers[engine] = server
            return engine

        yield start
        for server in cls.servers.values():
            server.stop()

    def change_weights(self, engine: Engine) -> None:
        self.servers[engine].collective_rpc("reload_weights", weights_path=str(self.other_weights))

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        engine.switch(watch_weights=False)  # type: ignore[attr-defined]
