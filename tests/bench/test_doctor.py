"""The doctor: what works here, what a config would cost, and the wrong package told from the right one."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thaw import load_engine
from thaw.bench import doctor
from thaw.bench.doctor import model, place, software
from thaw.core.errors import InvalidRequest, NotFound, ThawError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


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
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_hidden_layers": None}, "does not give layers"),
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
    assert found.status == "problem" and "another project" in found.text and "pip uninstall" in found.advice


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
