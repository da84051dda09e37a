"""`engine config`, `up`, `down`: the file, the process, what is remembered. A small real server stands in for vLLM."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import thaw
from thaw import serve
from thaw.cli import boot, options
from thaw.core.errors import Busy, EngineDied, InvalidRequest, TimedOut
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.vllm import settings as vllm
from thaw.repo.settings import EngineSettings, recall, remember
from thaw.serve import lifecycle
from thaw.serve import process as server
from thaw.serve import record as served
from thaw.store import Store

from .conftest import Shell

ANSWERS = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
print("loading weights", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""
LEAVES_A_CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {ANSWERS!r}, sys.argv[1]]).wait()"


def started(code: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    port = server.free_port("127.0.0.1")
    return server.start([sys.executable, "-c", code, str(port)], log), f"http://127.0.0.1:{port}"


def record(process: subprocess.Popen[bytes], url: str, **changes: object) -> served.Served:
    fields: dict[str, object] = {
        "engine": "vllm", "url": url, "model": "some/model", "pid": process.pid, "born": served.born(process.pid),
        "host": socket.gethostname(), "log": "", "config": "", "mail": "", "started_ns": 0,
    }  # fmt: skip
    return served.Served(**{**fields, **changes})  # type: ignore[arg-type]


# -- engine config


def test_the_file_loads_thaw_and_knows_the_repository(repo: Shell) -> None:
    done = repo.ok("engine", "config", "vllm", "--store", ".", "--arena", "1.5GiB", "--mail", "box", "--json").json()
    path = Path(done["path"])
    said = yaml.safe_load(path.read_text())
    found = vllm.from_extra_config(said["kv-transfer-config"]["kv_connector_extra_config"])
    with Store.open(repo.cwd / ".thaw") as store:
        assert found.stores == {store.uuid: str(store.packs.resolve())}
    assert found.arena_nbytes == 3 << 29
    assert found.mail == done["mail"] == str(repo.cwd / "box")
    assert done["command"] == ["vllm", "serve", "MODEL", "--config", "thaw.yaml"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_is_replaced_only_when_told_to(shell: Shell) -> None:
    shell.ok("engine", "config", "vllm")
    before = (shell.cwd / "thaw.yaml").read_text()
    refused = shell("engine", "config", "vllm")
    assert refused.code == 4 and "--force" in refused.err
    assert (shell.cwd / "thaw.yaml").read_text() == before
    assert "--config thaw.yaml" in shell.ok("engine", "config", "vllm", "--force").out
    assert (shell.cwd / "thaw.yaml").read_text() != before


def test_a_name_that_vllm_would_not_read_is_refused(shell: Shell) -> None:
    assert shell("engine", "config", "vllm", "--out", "thaw.json").code == 2
    assert "kv-transfer-config" in shell.ok("engine", "config", "vllm", "--out", "-").out


def test_another_connector_stands_beside_thaw(shell: Shell) -> None:
    mine = '{"kv_connector": "Mine", "kv_role": "kv_producer"}'
    out = shell.ok("engine", "config", "vllm", "--beside", "OffloadingConnector", "--beside", mine, "--out", "-").out
    children = yaml.safe_load(out)["kv-transfer-config"]["kv_connector_extra_config"]["connectors"]
    assert [child["kv_connector"] for child in children] == ["ThawConnector", "OffloadingConnector", "Mine"]
    assert children[2]["kv_role"] == "kv_producer"
    for wrong in ("{kv_connector}", '{"kv_role": "kv_both"}', "ThawConnector"):
        assert shell("engine", "config", "vllm", "--beside", wrong, "--out", "-").code == 2


def test_counts_and_the_switch_are_of_an_engine_that_runs(repo: Shell) -> None:
    for words in (["stats"], ["switch", "off"]):
        refused = repo("engine", *words)
        assert refused.code != 0 and ("thaw up" in refused.err or "--model" in refused.err)
        assert repo("engine", *words, "http://127.0.0.1:9").code != 0
    assert repo("engine", "switch", "sideways").code == 2


def test_a_store_elsewhere_is_given_by_uuid(shell: Shell) -> None:
    text = shell.ok("engine", "config", "vllm", "--out", "-", "--store", "12ab=/data/packs").out
    extra = yaml.safe_load(text)["kv-transfer-config"]["kv_connector_extra_config"]
    assert extra["thaw"]["stores"] == {"12ab": "/data/packs"}
    assert shell("engine", "config", "vllm", "--store", "nowhere").code == 2


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("64M", 64 << 20), ("1000", 1000), ("1.5kb", 1536)]
)
def test_bytes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert options.num_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "4 parsecs", "-1", "1e9", "inf"])
def test_other_words_for_bytes_are_refused(text: str) -> None:
    import click

    with pytest.raises(click.BadParameter, match="4GiB"):
        options.num_bytes(text)


# -- a server in the background


@pytest.mark.slow("waits for servers")
def test_a_server_is_waited_for_and_all_of_it_is_ended(tmp_path: Path) -> None:
    process, url = started(LEAVES_A_CHILD, tmp_path / "log")
    server.wait(process, url, tmp_path / "log", 60)
    assert served.answers(url)
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600
    server.stop(process.pid, process, polite_s=2)
    assert not served.answers(url, 1)


def test_a_server_that_dies_says_its_last_words(tmp_path: Path) -> None:
    process, url = started("print('no such model: x'); raise SystemExit(3)", tmp_path / "log")
    with pytest.raises(EngineDied, match=r"(?s)code 3.*no such model: x"):
        server.wait(process, url, tmp_path / "log", 60)


def test_the_first_error_of_a_long_log_is_told(tmp_path: Path) -> None:
    """vLLM logs what a worker met, and pages of what its other processes say of that."""
    cause = "(Worker pid=7) ERROR 11-30 15:03:15 [executor.py:953] ValueError: 16 of 22 GiB are free; ask for less"
    other = "(Core pid=6) INFO 11-30 15:03:15 [x.py:1] LateError: is no error, for it was logged as information"
    lines = [other, cause, *(f"  File a.py, line {i}" for i in range(30)), "RuntimeError: see the root cause above"]
    process, url = started(f"print({chr(10).join(lines)!r}); raise SystemExit(3)", tmp_path / "log")
    with pytest.raises(EngineDied, match=r"starting\.\n +ValueError: 16 of 22 GiB are free; ask for less\n") as died:
        server.wait(process, url, tmp_path / "log", 60)
    assert "RuntimeError: see the root cause above" in str(died.value) and str(died.value).count("ValueError") == 1
    assert server.ending(tmp_path / "none").startswith("full log:")


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    process, url = started("import time; time.sleep(600)", tmp_path / "log")
    with pytest.raises(TimedOut, match="--timeout"):
        server.wait(process, url, tmp_path / "log", 0.5)
    assert process.poll() is not None


# -- what is remembered


def test_a_process_id_that_is_anothers_by_now_is_not_ended(repo: Shell, tmp_path: Path) -> None:
    process, url = started(ANSWERS, tmp_path / "log")
    try:
        with Store.open(repo.cwd / ".thaw") as store:
            served.remember(store, record(process, url, born="another boot:17"))
        assert "already gone" in repo.ok("down").out
        assert process.poll() is None
    finally:
        server.stop(process.pid, process)


def test_down_ends_it_and_the_repository_remembers_what_it_did_before(repo: Shell, tmp_path: Path) -> None:
    process, url = started(ANSWERS, tmp_path / "log")
    server.wait(process, url, tmp_path / "log", 60)
    mail = Mailbox(tmp_path / "mail").folder
    with Store.open(repo.cwd / ".thaw") as store:
        before = recall(store)
        served.remember(store, record(process, url, before=before, mail=str(mail)))
        store.set_setting("engine", json.dumps({"name": "vllm", "options": {"url": url}}))
        assert boot.choose(store, None, None).options == {"url": url}
    refused = repo("up", "--model", "other/model")
    assert refused.code == 4 and url in refused.err and "thaw down" in refused.err
    looked = repo("doctor", "--quick", "--json").json()
    assert any(f["name"] == "server" and f["status"] == "ok" and url in f["text"] for f in looked["findings"])
    assert repo.ok("down", "--json").json() == {"ended": True, "url": url, "pid": process.pid}
    process.wait(10)
    assert not mail.exists()
    with Store.open(repo.cwd / ".thaw") as store:
        assert served.recall(store) is None and recall(store) == before
    assert repo.ok("down").out == "no engine server is up\n"


def test_a_program_finds_and_ends_the_server_of_a_repository_as_the_verbs_do(repo: Shell, tmp_path: Path) -> None:
    process, url = started(ANSWERS, tmp_path / "log")
    server.wait(process, url, tmp_path / "log", 60)
    with thaw.open(repo.cwd / ".thaw") as opened:
        assert serve.running(opened) is None
        served.remember(opened.store, record(process, url))
        assert (found := serve.running(opened)) is not None and found.url == url
        with pytest.raises(Busy, match="is up already"):
            serve.up(opened, "vllm", "a/model")
        with pytest.raises(serve.NoServer, match="no server for an engine 'fake'"):
            serve.up(opened.within("acme"), "fake") if serve.down(opened)[1] else None
        assert serve.running(opened) is None and serve.down(opened) == (None, False)
    process.wait(10)


def test_doctor_says_when_the_server_is_gone(repo: Shell, tmp_path: Path) -> None:
    process, url = started(ANSWERS, tmp_path / "log")
    known = record(process, url)
    server.stop(process.pid, process)
    with Store.open(repo.cwd / ".thaw") as store:
        served.remember(store, known)
    looked = repo("doctor", "--quick", "--json").json()
    found = next(f for f in looked["findings"] if f["name"] == "server")
    assert found["status"] == "warning" and "thaw down" in found["advice"]
    repo.ok("down")


def test_without_a_server_before_it_the_model_is_remembered(shell: Shell, tmp_path: Path) -> None:
    shell.ok("init")
    process, url = started(ANSWERS, tmp_path / "log")
    known = record(process, url)
    server.stop(process.pid, process)
    with Store.open(shell.cwd / ".thaw") as store:
        store.set_setting("engine", json.dumps({"name": "vllm", "options": {"url": url}}))
        lifecycle._restore(store, known)
        assert recall(store) == EngineSettings(name="vllm", options={"model": "some/model"})


def test_up_says_what_the_python_lacks(repo: Shell) -> None:
    bare = repo.cwd / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    refused = repo("up", "--model", "some/model", "--python", str(bare))
    assert refused.code == 2 and "neither vLLM nor thaw" in refused.err
    assert repo("up", "--model", "some/model", "--python", "/nowhere").code == 2
    assert not (repo.cwd / ".thaw" / "engine.log").exists()


def test_up_needs_a_model(repo: Shell) -> None:
    refused = repo("up")
    assert refused.code == 2 and "--model" in refused.err


@pytest.mark.parametrize("sizes", [[1] * 8, [1, 10, 1, 1, 1], [100, 1]], ids=["many", "a large one", "too large"])
def test_former_logs_are_kept_as_far_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(server, "FORMER_NBYTES", 10)
    log = tmp_path / "engine.log"
    for i, size in enumerate(sizes):
        server.keep_former(log)
        assert not log.exists()
        log.write_text(f"{i}" * size)
    server.keep_former(log)
    former = [log.with_name(f"engine.log.{i + 1}") for i in range(server.FORMER_LOGS)]
    said = [path.read_text()[0] for path in former if path.exists()]
    expected = {8: ["7", "6", "5", "4", "3"], 5: ["4", "3", "2"], 2: ["1"]}[len(sizes)]
    assert said == expected and len(list(tmp_path.iterdir())) == len(said)


def test_a_log_is_there_after_the_next_server_has_started(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    for i in range(3):
        server.start([sys.executable, "-c", f"print('server {i}')"], log).wait()
    texts = [log.with_name(name).read_text() for name in ("engine.log", "engine.log.1", "engine.log.2")]
    assert texts == ["server 2\n", "server 1\n", "server 0\n"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


# -- joining one

LOCKED = """
import http.server, json, sys
class Locked(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers["Authorization"] == "Bearer sesame"
        said = b"{}" if known else b'{"error": "Unauthorized"}'
        self.send_response(200 if known else 401); self.send_header("Content-Length", str(len(said)))
        self.end_headers(); self.wfile.write(said)
    def do_GET(self):
        self.send_response(404); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Locked).serve_forever()
"""
"""A server of the OpenAI kind that wants a key, and has no thaw."""
JOINING = {
    "run": ("run", "Why?", "--engine", "URL"),
    "fork": ("fork", "main", "Why?", "--engine", "URL"),
    "match": ("match", "Why?", "--engine", "URL"),
    "verify": ("verify", "main", "--engine", "URL"),
    "pool run": ("pool", "run", "main", "Why?", "--attach", "URL"),
    "engine stats": ("engine", "stats", "URL"),
    "engine switch": ("engine", "switch", "off", "URL"),
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = started(LOCKED, tmp_path_factory.mktemp("locked") / "log")
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))):
            time.sleep(0.05)
    yield url
    server.stop(process.pid, process)


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("THAW_API_KEY", "VLLM_API_KEY", "SGLANG_API_KEY"):
        monkeypatch.setenv(name, "")


@pytest.mark.slow("asks a server with every verb")
@pytest.mark.parametrize("verb", JOINING)
@pytest.mark.usefixtures("no_keys")
def test_every_verb_that_joins_a_server_takes_its_key(tree: Shell, locked: str, verb: str) -> None:
    """The server here has no thaw, and that is what is said when the key is right."""
    words = [locked if word == "URL" else word for word in JOINING[verb]]
    done = tree(*words, "--api-key", "sesame")
    assert done.code == 2 and "without thaw's connector" in done.err, done.err


@pytest.mark.parametrize("variable", ["THAW_API_KEY", "VLLM_API_KEY", None])
@pytest.mark.usefixtures("no_keys")
def test_the_key_may_be_in_a_variable(shell: Shell, locked: str, variable: str | None) -> None:
    done = shell("engine", "stats", locked, **({variable: "sesame"} if variable else {}))
    said = "without thaw's connector" if variable else "refused the API key (401)"
    assert done.code == 2 and said in done.err
    assert variable or "--api-key, or the variable THAW_API_KEY" in done.err


@pytest.mark.usefixtures("no_keys")
def test_doctor_asks_a_server_with_its_key(repo: Shell, locked: str) -> None:
    with Store.open(repo.cwd / ".thaw") as store:
        remember(store, EngineSettings(name="vllm", options={"url": locked}))
    assert "does not answer" in repo("doctor", "--quick").out
    assert "thaw is not active in the server" in repo("doctor", "--quick", "--api-key", "sesame").out


@pytest.mark.slow("asks a server with every verb")
@pytest.mark.parametrize("key", ["é", "sesame\n", " ", " sesame", "sesame "])
@pytest.mark.usefixtures("no_keys")
def test_a_key_that_cannot_be_sent_is_named_and_not_shown(repo: Shell, locked: str, key: str) -> None:
    with Store.open(repo.cwd / ".thaw") as store:
        remember(store, EngineSettings(name="vllm", options={"url": locked}))
    for words in (("engine", "stats"), ("run", "Why?")):
        by_variable, by_option = repo(*words, THAW_API_KEY=key), repo(*words, "--api-key", key)
        assert (by_variable.code, by_option.code) == (2, 2)
        assert "THAW_API_KEY is no API key" in by_variable.err and "--api-key is no API key" in by_option.err
        assert "same" not in by_variable.err + by_option.err
    report = repo("doctor", "--quick", THAW_API_KEY=key)
    assert report.code == 1 and "cannot be asked: THAW_API_KEY is no API key" in " ".join(report.out.split())
    assert "--api-key is no API key" in repo("up", "--model", "m", "--", "--api-key", key).err


def test_an_engine_may_be_named_by_its_url() -> None:
    assert boot.choose(None, "http://here:8000/", None) == EngineSettings(
        name="vllm", options={"url": "http://here:8000"}
    )
    with pytest.raises(InvalidRequest, match="runs already"):
        boot.choose(None, "http://here:8000", "some/model")


def test_an_engine_without_a_server_cannot_be_joined() -> None:
    from thaw.core.errors import Unsupported
    from thaw.engines import load_engine

    with pytest.raises(Unsupported, match="no server"):
        load_engine("fake", url="http://here:8000")


@pytest.mark.parametrize("ranks", [("",), ("dp0", "dp1")], ids=["one engine", "two ranks"])
def test_the_mail_of_a_server_that_went_down_is_removed_and_another_folder_is_not(
    tmp_path: Path, ranks: tuple[str, ...]
) -> None:
    for rank in ranks:
        Mailbox(tmp_path / "mail" / rank)
    (tmp_path / "other").mkdir()
    for folder in ("mail", "other"):
        lifecycle.sweep(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
