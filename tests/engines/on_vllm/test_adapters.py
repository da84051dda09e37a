"""LoRA adapters on real vLLM: in process, over HTTP with adapters that its server loaded, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import thaw
from adapter_laws import AdapterLaws, Adapters, begun, far, made_adapters, named
from thaw.core.errors import IdentityMismatch, InvalidRequest, Unsupported
from thaw.data.locations import StoreMount
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing.laws.kit import Lab, greedy, ids, same
from thaw.testing.models import make_random_adapter
from thaw.testing.plans import mount_at

vllm = pytest.importorskip("vllm")
if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < (0, 32):
    pytest.skip("older releases refuse adapters by name", allow_module_level=True)

from test_http import Server  # noqa: E402

from thaw.engines.vllm.client.engine import VllmEngine  # noqa: E402
from thaw.engines.vllm.settings import VllmSettings, engine_args  # noqa: E402


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return made_adapters(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def lab(mount: StoreMount) -> Lab:
    return Lab(mount)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> StoreMount:
    return mount_at(tmp_path_factory.mktemp("packs"))


class TestInProcess(AdapterLaws):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, model: Path, folders: Adapters) -> Iterator[Engine]:
        options = {"enforce_eager": True, "max_model_len": 1024, "max_loras": 4, "max_cpu_loras": 4}
        with load_engine("vllm", model=str(model), adapters=named(folders), **options) as loaded:
            yield loaded

    def test_the_engine_itself_refuses_a_request_under_another_adapter(self, engine: VllmEngine, lab: Lab) -> None:
        """Whatever a client says: the adapter of the request, the one of its message and the source's are compared."""
        session, sessions = begun(engine, "law"), engine._sessions
        ours = engine.adapters()
        for wrong in (ours["code"], None):
            child = lab.twin(engine, session)
            sessions[child].adapter = wrong
            with pytest.raises(IdentityMismatch, match="would read KV that it did not compute"):
                lab.one(engine, child, greedy(2))
        served = engine._model.adapters._served
        served[ours["law"]], law = served[ours["code"]], served[ours["law"]]
        try:
            with pytest.raises(IdentityMismatch, match=f"what this engine has under that name now is {ours['code']}"):
                lab.one(engine, lab.twin(engine, session), greedy(2))
        finally:
            served[ours["law"]] = law
        assert len(lab.one(engine, session, greedy(2)).token_ids) == 2

    def test_more_adapters_than_run_in_one_step_are_refused_in_one_batch(
        self, engine: VllmEngine, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sessions = [begun(engine, name, 20) for name in ("law", "code")]
        assert len(lab.run(engine, *sessions, sampling=greedy(2))) == 2
        facts = msgspec.structs.replace(engine._transport.facts, max_adapters=1)
        monkeypatch.setattr(engine._transport, "facts", facts)
        with pytest.raises(InvalidRequest, match=r"2 adapters in one batch; .* at most 1"):
            lab.run(engine, *sessions, sampling=greedy(2))

    def test_a_fresh_process_boots_with_the_adapters_and_verifies(self, engine: VllmEngine, tmp_path: Path) -> None:
        with thaw.init(tmp_path / "runs", engine=engine) as repo:
            session = repo.session(adapter="law", seed=1)
            session.append("The same words for all.")
            session.commit("under it", branch="main")
            report = repo.verify("main", num_tokens=4)
            assert report.ok and report.fresh_process, report


class TestOverHttp(AdapterLaws):
    """Adapters that the server was started with, and ones that it loaded later."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, model: Path, folders: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        modules = [f"{name}={folder}" for name, folder in named(folders).items()]
        options = ["--max-model-len", "1024", "--enable-lora", "--max-loras", "4", "--max-cpu-loras", "8"]
        server = Server(
            model, tmp_path_factory.mktemp("server"), *options, "--lora-modules", *modules,
            VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
        )  # fmt: skip
        yield server
        server.stop()

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, server: Server) -> Iterator[Engine]:
        with thaw.attach(server.url) as joined:
            yield joined

    def reloaded(self, folder: Path) -> tuple[str, Path]:
        """vLLM's server takes a name once."""
        return "moved", folder

    def test_an_adapter_whose_files_were_changed_is_refused(
        self, engine: VllmEngine, lab: Lab, model: Path, tmp_path: Path
    ) -> None:
        """What is loaded is not what they say. The control: other adapters, and the same files where thaw copied them,
        run on."""
        folder = make_random_adapter(model, tmp_path / "loose", seed=11)
        engine._loop.wait(engine._transport.load_adapter("loose", str(folder)))
        session = begun(engine, "loose", 50)
        copied = engine.load_adapter("copied", folder)
        assert engine.adapters()["loose"] == copied == engine.view(session).adapter
        make_random_adapter(model, folder, seed=12)
        fresh = engine.open(adapter="loose")
        with pytest.raises(Unsupported, match="files of the request's adapter were changed"):
            engine.append(fresh, ids(20)).result(60)
        assert len(lab.one(engine, begun(engine, "copied", 50), greedy(2)).token_ids) == 2

    def test_one_loaded_in_place_is_refused(self, engine: VllmEngine, model: Path, tmp_path: Path) -> None:
        folder = make_random_adapter(model, tmp_path / "place", seed=13)

        async def load() -> int:
            body = {"lora_name": "place", "lora_path": str(folder), "load_inplace": True}
            return (await engine._transport._client.post("/v1/load_lora_adapter", json=body)).status_code

        assert engine._loop.wait(load()) == 200
        with pytest.raises(Unsupported, match="loaded in place"):
            engine.append(engine.open(adapter="place"), ids(20)).result(60)


def test_an_llm_of_the_programs_own_runs_them(model: Path, folders: Adapters, lab: Lab) -> None:
    from vllm import LLM

    own = engine_args(VllmSettings())
    llm = LLM(str(model), enforce_eager=True, max_model_len=512, enable_lora=True, max_loras=2, **own)
    with thaw.attach(llm) as engine:
        assert engine.load_adapter("law", folders.one) == engine.load_adapter("again", folders.twin)
        session = begun(engine, "law")
        moved = lab.move(engine, session, engine)
        same(lab.one(engine, session, greedy(8)), lab.one(engine, moved, greedy(8)))
        assert far(lab.one(engine, begun(engine, None), greedy(8)), lab.one(engine, begun(engine, "again"), greedy(8)))
