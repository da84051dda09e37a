"""An engine of another package can do all that thaw's own can: `tests/packages/icebox`, found by its entry point."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw.core.errors import InvalidRequest, NotFound, StaleSession, Unsupported
from thaw.engines import registry
from thaw.engines.registry import OWN, available, engine_at, kind_of, kinds

PACKAGES = Path(__file__).resolve().parents[1] / "packages" / "icebox"
SOURCE = Path(thaw.__file__).resolve().parents[1]
MODEL = "ice-7"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGES))


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(PACKAGES), str(SOURCE)))
    return {**{k: v for k, v in os.environ.items() if k != "THAW_REPO"}, "PYTHONPATH": path, "PYTHONUTF8": "1"}


def cli(folder: Path, *words: str, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "thaw.cli", *words, "--json"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of icebox's that somebody started, which knows the repository at `tmp_path`/runs."""
    with thaw.init(tmp_path / "runs") as repo:
        stores = {repo.store.uuid: str(repo.store.packs.resolve())}
    (tmp_path / "icebox.json").write_text(json.dumps({"stores": stores}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "icebox.serve", MODEL, str(port), str(tmp_path / "icebox.json")]
    with subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL) as process:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        process.kill()


def test_it_is_found_by_its_entry_point_and_loaded() -> None:
    assert available()["icebox"].value == "icebox.kind:KIND"
    with thaw.load_engine("icebox", model=MODEL) as engine:
        assert engine.info.name == "icebox" and engine.options == {"model": MODEL}


@pytest.mark.parametrize(
    ("options", "name"), [({"policy": "1"}, "'model'"), ({"model": MODEL, "dtype": "float16"}, "'dtype'")]
)
def test_an_option_that_is_missing_or_that_it_has_not_is_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"engine icebox: .*{name}"):
        thaw.load_engine("icebox", **options)


def test_an_object_of_its_own_is_joined() -> None:
    from icebox import Icebox

    running = Icebox(MODEL)
    assert thaw.attach(running) is running.engine
    with pytest.raises(InvalidRequest, match="tokenizer: only for a model in this process"):
        thaw.attach(running, tokenizer=object())


def test_an_object_that_nobody_knows_is_refused_naming_who_was_asked() -> None:
    with pytest.raises(InvalidRequest, match=r"a dict is none of.*\(fake, icebox, sglang, transformers, vllm\)"):
        thaw.attach({})


def test_its_server_is_recognised_and_a_session_goes_through_it_to_disk_and_back(server: str, tmp_path: Path) -> None:
    assert engine_at(server) == engine_at(f"{server}/") == "icebox"
    with thaw.attach(server) as engine, thaw.open(tmp_path / "runs", engine=engine) as repo:
        session = repo.session(seed=1)
        session.append("a long winter")
        session.commit("cold", branch="main")
        expected = session.fork(2).generate(["Why?", "How?"], thaw.Sampling(max_tokens=6, temperature=0.0))
        again = repo.session("main").fork(2).generate(["Why?", "How?"], thaw.Sampling(max_tokens=6, temperature=0.0))
        assert [out.token_ids for out in again] == [out.token_ids for out in expected]
    with thaw.open(tmp_path / "runs") as repo:
        remembered = repo.engine_settings()
        assert remembered is not None and (remembered.name, remembered.options["url"]) == ("icebox", server)
        assert repo.log("main")[0].state


def test_its_weights_are_updated_over_its_server(server: str) -> None:
    with thaw.attach(server) as engine:
        before, session = engine.identity(), engine.open()
        engine.append(session, [1, 2, 3]).result()
        engine.update_weights("8")
        assert engine.identity().weights != before.weights
        with pytest.raises(StaleSession):
            engine.append(session, [4]).result()
        engine.update_weights("7")
        assert engine.identity() == before


def test_thaw_up_starts_it_the_doctor_looks_at_it_and_down_ends_it(tmp_path: Path) -> None:
    cli(tmp_path, "init")
    up = cli(tmp_path, "up", "--engine", "icebox", "--model", MODEL)
    try:
        assert up["engine"] == "icebox" and up["config"].endswith(".thaw/icebox.json")
        assert "[icebox] freezing ice-7" in Path(up["log"]).read_text()
        cli(tmp_path, "run", "a long winter", "--max-tokens", "4")
        found = {f["name"]: f for f in cli(tmp_path, "doctor", "--quick")["findings"]}
        assert found["engine.icebox"]["text"] == "engine icebox (icebox 1.0)"
        assert found["icebox-room"]["status"] == "ok"
        assert f"icebox at {up['url']}" in found["server"]["text"] and found["server"]["status"] == "ok"
        assert found["connector"]["text"] == f"icebox writes to {up['log']}"
    finally:
        assert cli(tmp_path, "down")["ended"]
    assert cli(tmp_path, "log")["commits"]


def test_the_doctor_asks_a_server_that_somebody_else_started(server: str, tmp_path: Path) -> None:
    cli(tmp_path, "-C", "runs", "run", "a long winter", "--max-tokens", "4", "--engine", server)
    found = {f["name"]: f for f in cli(tmp_path, "-C", "runs", "doctor", "--quick")["findings"]}
    assert found["server"]["text"].startswith(f"icebox at {server} keeps ")


def test_its_file_is_written_by_engine_config(tmp_path: Path) -> None:
    cli(tmp_path, "init")
    said = cli(tmp_path, "engine", "config", "icebox", "--store", ".", "--out", "ice.json")
    assert said["command"] == ["python", "-m", "icebox.serve", "MODEL", "PORT", "ice.json"]
    (folder,) = json.loads((tmp_path / "ice.json").read_text())["stores"].values()
    assert folder == str((tmp_path / ".thaw" / "packs").resolve())
    refused = cli(tmp_path, "engine", "config", "icebox", "--out", "ice.yaml", code=2)
    assert "Icebox only reads files whose names end in .json" in refused["error"]["message"]


@pytest.mark.parametrize("name", ["fake", "transformers", "nothing"])
def test_up_refuses_what_has_no_server_naming_those_that_have(tmp_path: Path, name: str) -> None:
    cli(tmp_path, "init")
    error = cli(tmp_path, "up", "--engine", name, "--model", MODEL, code=2)["error"]
    assert error["kind"] == "usage" and "icebox, sglang, vllm" in error["message"]


def test_the_metadata_on_the_path_is_that_of_the_package() -> None:
    declared = (PACKAGES / "pyproject.toml").read_text().split('[project.entry-points."thaw.engines"]\n')[1]
    found = (PACKAGES / "icebox-1.0.dist-info" / "entry_points.txt").read_text().split("[thaw.engines]\n")[1]
    assert declared.replace('"', "") == found


# -- entry points of other shapes


def pointing(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [EntryPoint(name, value, group)])


def test_a_function_is_enough_to_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pointing(monkeypatch, "plain", "thaw.engines.fake:load".replace("thaw.engines", "loaders"))
    monkeypatch.setitem(sys.modules, "loaders", sys)
    import types

    module = types.ModuleType("loaders.fake")
    module.load = lambda: thaw.load_engine("fake")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loaders.fake", module)
    with thaw.load_engine("plain") as engine:
        assert engine.info.name == "fake"
    with pytest.raises(Unsupported, match="plain is loaded into this process; it has no server"):
        thaw.load_engine("plain", url="http://127.0.0.1:9")
    assert kind_of("plain").server is None


@pytest.mark.parametrize("value", ["no.such.module:KIND", "thaw:nothing", "json:dumps.__name__"])
def test_one_that_is_broken_is_named_and_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    pointing(monkeypatch, "broken", value)
    with pytest.raises(NotFound, match=f"engine broken.*{value}"):
        thaw.load_engine("broken")
    with pytest.warns(RuntimeWarning, match="engine broken"):
        assert [kind.name for kind in kinds()] == list(OWN)


def test_a_name_that_two_packages_claim_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pointing(monkeypatch, "vllm", "other.vllm:KIND")
    with pytest.raises(InvalidRequest, match=r"two packages provide an engine named 'vllm'.*other\.vllm"):
        available()


def test_what_an_older_installation_of_thaw_declared_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pointing(monkeypatch, "fake", "thaw.engines.fake:load")
    assert available()["fake"].value == OWN["fake"]


def test_each_of_thaws_own_kinds_has_the_name_of_its_engine() -> None:
    assert {name: kind_of(name).name for name in OWN} == {name: name for name in OWN}
    assert registry.DEFAULT in OWN and kind_of(registry.DEFAULT_SERVER).server is not None


def test_no_engine_is_named_above_the_registry() -> None:
    """A verb, the doctor and what attaches ask the registry. What is about one engine alone stays so: its bench, the
    arms that are measured beside it, examples and words of help."""
    root = SOURCE / "thaw"
    rooms = [path for room in ("doctor", "repo", "pool", "serve", "demo") for path in (root / room).rglob("*.py")]
    rooms += [root / "engines" / "joining.py", root / "cli" / "boot.py", root / "cli" / "verbs" / "doctor.py"]
    assert len(rooms) > 60
    for path in rooms:
        text = path.read_text()
        for name in ("vllm", "sglang"):
            for example in (f'ForkPool("{name}"', f'pool("{name}"', f'serve.up(repo, "{name}"'):
                text = text.replace(example, "")
            assert f'"{name}"' not in text, path
            assert f"thaw.engines.{name}" not in text or path.name == "joining.py", path
