"""The doctor: what works here, what a config would cost, and the wrong package told from the right one."""

from __future__ import annotations

import json
import os
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thaw import doctor, load_engine
from thaw.core.cache import FullKV
from thaw.core.errors import InvalidRequest, NotFound, ThawError
from thaw.core.findings import Finding
from thaw.doctor import model, place, server, software
from thaw.engines.served.mailbox import SCHEDULER, Mailbox
from thaw.engines.served.protocol import EngineFacts, WorkerFacts
from thaw.engines.vllm import kind as vllm
from thaw.serve import record as served
from thaw.serve.record import Served
from thaw.store import Store

GROUP = FullKV(name="full", first_layer=0, num_layers=3, num_kv_heads=2, head_dim=64, dtype="bfloat16")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_it_is_found_under_the_name_that_it_had() -> None:
    from thaw.bench import doctor as former

    assert former.examine is doctor.examine and former.DoctorReport is doctor.DoctorReport


def write(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_a_config_alone_says_kv_bytes_and_size(tmp_path: Path) -> None:
    report = doctor.examine(config=write(tmp_path, LLAMA), repository=tmp_path, measure=False)
    found = report.model
    assert found is not None and found.supported and found.tested
    assert found.kv_token_nbytes == 128 << 10
    assert found.session_nbytes == 512 << 20
    assert found.cache_groups == ("full: layers 0..31, 8 KV heads of 128, bfloat16",)
    assert found.num_parameters == pytest.approx(8.03e9, rel=0.01)
    assert found.name == tmp_path.name
    assert report.ok and report.figures == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sliding_window": 4096}, "sliding window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "changes with length"),
        ({"kv_lora_rank": 512}, "latent"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["full_attention", "linear_attention"] * 16}, "linear_attention"),
        ({"model_type": "of_tomorrow", "num_hidden_layers": None}, "does not give layers"),
    ],
)
def test_what_is_not_supported_is_said_with_the_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    report = doctor.examine(config=write(tmp_path, {**LLAMA, **change}), measure=False)
    assert report.model is not None and not report.model.supported and not report.ok
    found = report.finding("model")
    assert found is not None and found.status == "problem" and reason in found.text


def test_a_small_config_is_measured_and_every_figure_says_how(tmp_path: Path) -> None:
    small = {**LLAMA, "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 1000, "intermediate_size": 512}
    report = doctor.examine(config=write(tmp_path, small), repository=tmp_path / "runs")
    names = {figure.name: figure for figure in report.figures}
    assert {"write", "read-cold", "read-cached", "load-cold", "load-cached"} <= set(names)
    assert all(figure.value > 0 and figure.text for figure in report.figures)
    assert names["read-cold"].basis == "measured" and names["load-cold"].basis == "estimated"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert msgspec.json.decode(msgspec.json.encode(report), type=doctor.DoctorReport) == report


def test_a_loaded_engine_is_measured_itself(tmp_path: Path) -> None:
    with load_engine("fake") as engine:
        report = doctor.examine(config=write(tmp_path, LLAMA), repository=tmp_path, engine=engine)
    prefill = report.figure("prefill")
    assert prefill is not None and "loaded engine" in prefill.text


def test_this_installation_is_ours() -> None:
    report = doctor.examine(measure=False)
    found = report.finding("thaw")
    assert found is not None and found.status in ("ok", "info")
    for name in ("python", "sqlite", "engine.fake", "machine", "shm", "disk", "filesystem", "permission"):
        assert report.finding(name) is not None, name
    assert report.ok


class Stranger(metadata.Distribution):
    """A distribution of our name by others."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": "Metadata-Version: 2.1\nName: thaw-vllm\nVersion: 9.9\n",
            "entry_points.txt": "[vllm.general_plugins]\nthaw = thaw:register\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(path)


def test_the_wrong_package_of_our_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not software.is_ours(Stranger())
    monkeypatch.setattr(software.metadata, "distribution", lambda _: Stranger())
    found = {finding.name: finding for finding in software.findings()}["thaw"]
    assert found.status == "problem" and "unrelated project" in found.text and "pip uninstall" in found.advice


def test_another_distribution_with_our_module_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.metadata, "packages_distributions", lambda: {"thaw": ["thaw_vllm", "ice-tools"]})
    found = [finding for finding in software.findings() if finding.name == "thaw-module"]
    assert len(found) == 1 and "ice-tools" in found[0].text


def test_a_network_file_system_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(place, "mount_type", lambda *_: "nfs4")
    report = doctor.examine(repository=tmp_path, measure=False)
    found = report.finding("filesystem")
    assert found is not None and found.status == "problem" and "nfs4" in found.text and not report.ok


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"7"])
def test_what_is_no_config_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InvalidRequest):
        doctor.examine(config=tmp_path, measure=False)


def test_a_config_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        doctor.examine(config=tmp_path, measure=False)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=5)
    | st.just([1])
    | st.just({})
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*LLAMA, "head_dim", "rope_scaling", "layer_types", "dtype"]), VALUES))
def test_strange_configs_give_only_our_errors(change: dict[str, Any]) -> None:
    try:
        model.report("strange", {**LLAMA, **change})
    except ThawError as error:
        assert isinstance(error, InvalidRequest)


# --- what a server's processes said of themselves


def said(mail: Path, *, workers: int = 1, prefix_caching: bool = True) -> Path:
    """A mail folder as an engine of one worker leaves it."""
    facts = EngineFacts(
        protocol=1, thaw="1", version="0.32.0", pid=1, model="m", dtype="bfloat16", max_model_len=512, max_logprobs=20,
        block_size=128, num_blocks=8, world_size=1, prefix_caching=prefix_caching, runner="V1",
        vocab_size=320, eos_token_ids=(2,),
    )  # fmt: skip
    here = Mailbox(mail)
    here.post(SCHEDULER, facts)
    for rank in range(workers):
        here.post(rank, WorkerFacts(
            rank=rank, world_size=1, pid=1, groups=(GROUP,), layout={"kind": "made up"},
        ))  # fmt: skip
    return mail


def connectors(repository: Path, mail: Path, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """The doctor's findings on a server that `thaw up` started with that mail folder, and that answers."""
    with Store.init(repository) as store:
        known = Served(
            engine="vllm", url="http://127.0.0.1:9", model="m", pid=os.getpid(), born=served.born(os.getpid()),
            host=socket.gethostname(), log="engine.log", config="", mail=str(mail), started_ns=1,
        )  # fmt: skip
        served.remember(store, known)
    monkeypatch.setattr(served, "answers", lambda url: True)
    return [found for found in server.findings(repository) if found.name.startswith("connector")]


def test_every_rank_of_a_data_parallel_server_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mail = tmp_path / "mail"
    said(mail / "dp0")
    said(mail / "dp1", workers=0)
    first, second = connectors(tmp_path / "r", mail, monkeypatch)
    assert first.status == "ok" and "active in data-parallel rank 0 of vLLM 0.32.0 and in 1 of 1 workers" in first.text
    assert second.status == "problem" and "rank 1 of vLLM 0.32.0 and in 0 of 1 workers" in second.text


@pytest.mark.parametrize("on", [True, False])
def test_a_server_without_ranks_is_one_engine_and_says_whether_it_caches_prefixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    (found,) = connectors(tmp_path / "r", said(tmp_path / "mail", prefix_caching=on), monkeypatch)
    assert found.status == "ok" and "active in vLLM 0.32.0 and" in found.text
    assert f"prefix caching {'on' if on else 'off'}" in found.text
    assert "; cache groups: full: layers 0..2, 2 KV heads of 64, bfloat16; layout: kind made up" in found.text


def test_an_engine_of_another_protocol_is_told_from_workers_that_lack_thaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail = said(tmp_path / "mail")
    (mail / "facts" / "0").write_text('{"rank": 0, "world_size": 1, "total_heads": 2}')  # as version 5 had it
    (found,) = connectors(tmp_path / "r", mail, monkeypatch)
    assert found.status == "problem" and "speaks version 1 of thaw's protocol" in found.advice


def test_of_a_joined_server_all_ranks_that_run_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server says the folder of the rank that answered. Rank 2 is of an engine that is gone: its lock is free."""
    for rank in range(3):
        said(tmp_path / f"dp{rank}")
    (tmp_path / "dp2" / "facts" / "lock").touch()
    monkeypatch.setattr(vllm, "mail_at", lambda url: str(tmp_path / "dp1"))
    found = [one for one in server._joined("vllm", "http://127.0.0.1:9") if one.name == "connector"]
    assert [one.text.split("rank ")[1][0] for one in found] == ["0", "1"]
