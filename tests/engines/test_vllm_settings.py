"""The connector's options: what is written is read back, wrong ones are refused by name, nothing heavy loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from thaw.core.errors import InvalidRequest, Unsupported
from thaw.engines.served.settings import settled
from thaw.engines.vllm import settings, support, versions
from thaw.engines.vllm.kind import KIND
from thaw.engines.vllm.settings import VllmSettings

SRC = Path(__file__).resolve().parents[2] / "src"
FOLDERS = st.text(min_size=1, max_size=30)
SETTINGS = st.builds(
    VllmSettings,
    mail=FOLDERS,
    stores=st.dictionaries(st.text(max_size=36), FOLDERS, max_size=3),
    arena_nbytes=st.integers(0, 1 << 62),
    spill=st.none() | FOLDERS,
    async_nbytes=st.integers(0, 1 << 62),
    session_ttl_s=st.floats(0.001, 1e9),
    pin_fraction=st.floats(0, 1),
    pin_seconds=st.floats(0.001, 1e9),
    enabled=st.booleans(),
    others_keep_salt=st.booleans(),
)


def extra(config: dict[str, object]) -> dict[str, object]:
    found = config["kv_connector_extra_config"]
    assert isinstance(found, dict)
    return found


@given(SETTINGS)
def test_what_the_engine_reads_is_what_was_set(wanted: VllmSettings) -> None:
    assert settings.from_extra_config(extra(settings.kv_transfer_config(wanted))) == wanted


@given(SETTINGS)
@example(VllmSettings(mail="m", stores={"False": "s", "on": "t", "null": "u"}))
def test_the_file_says_what_the_arguments_say(wanted: VllmSettings) -> None:
    """Read as vLLM's --config reads it: YAML, a dash for each underscore of the top level."""
    said = yaml.safe_load(settings.config_file(wanted))
    assert {name.replace("-", "_"): value for name, value in said.items()} == settings.server_args(wanted)


OTHERS = [["OffloadingConnector"], ["Other", {"kv_connector": "P2p", "kv_role": "kv_producer"}]]


@given(SETTINGS, st.sampled_from(OTHERS))
def test_the_file_says_who_stands_beside_thaw_and_thaw_goes_first(wanted: VllmSettings, others: list[object]) -> None:
    said = yaml.safe_load(settings.config_file(wanted, others))["kv-transfer-config"]  # type: ignore[arg-type]
    children = said["kv_connector_extra_config"]["connectors"]
    assert said["kv_connector"] == "MultiConnector" and children[0]["kv_connector"] == settings.CONNECTOR
    assert [child["kv_role"] for child in children[1:]] == ["kv_both", "kv_producer"][: len(others)]
    kept = settings.from_extra_config(children[0]["kv_connector_extra_config"])
    assert kept.others_keep_salt is (len(others) == 1 or wanted.others_keep_salt)


def test_the_manifest_in_the_docs_holds_the_file_that_thaw_reads() -> None:
    page = (SRC.parent / "docs" / "engines" / "kubernetes.md").read_text(encoding="utf-8")
    manifest = page.rpartition("```yaml\n")[2].partition("```")[0]
    config_map, deployment = yaml.safe_load_all(manifest)
    said = yaml.safe_load(config_map["data"]["thaw.yaml"])
    wanted = VllmSettings(
        mail="/thaw/mail/engine",
        spill="/thaw/spill",
        stores={"00000000-0000-4000-8000-000000000000": "/thaw/store/packs"},
    )
    assert said == yaml.safe_load(settings.config_file(wanted))
    pod = deployment["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.keys() <= volumes
        for path in (wanted.mail, wanted.spill, *wanted.stores.values()):
            assert any(path is not None and path.startswith(place) for place in mounted.values())


def test_defaults_are_not_written_down() -> None:
    assert extra(settings.kv_transfer_config(VllmSettings())) == {"thaw": {}}


def test_the_file_names_a_mail_folder_and_no_two_files_the_same() -> None:
    first, second = (yaml.safe_load(settings.config_file(VllmSettings())) for _ in range(2))
    mails = [said["kv-transfer-config"]["kv_connector_extra_config"]["thaw"]["mail"] for said in (first, second)]
    assert all(mails) and mails[0] != mails[1]
    assert settled(VllmSettings(mail="/here")).mail == "/here"


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"arena": 1}, "arena"),
        ({"pin_fraction": 2}, "pin_fraction"),
        ({"arena_nbytes": -1}, "arena_nbytes"),
        ({"session_ttl_s": 0}, "session_ttl_s"),
        ({"stores": ["/a"]}, "stores"),
        ("on", "object"),
    ],
)
def test_a_wrong_option_is_refused_by_name(said: object, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        settings.from_extra_config({"thaw": said})


def test_without_options_the_defaults_hold() -> None:
    assert settings.from_extra_config({}) == settings.from_extra_config({"thaw": {}}) == VllmSettings()


def test_sessions_of_a_stored_model_may_be_captured() -> None:
    assert KIND.stored["load_format"] in support.LOADED_FROM_FILES


def test_writing_the_file_loads_neither_vllm_nor_torch() -> None:
    code = f"import sys; sys.path.insert(0, {str(SRC)!r}); import thaw.engines.vllm.settings\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not {"vllm", "torch", "numpy", "transformers"} & {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    ("version", "says"),
    [("0.26.0", ""), ("0.29.0+cpu", ""), ("0.27.0", "not run"), ("0.33.0", "newer"), ("dev", "release")],
)
def test_a_version_that_was_never_run_is_warned_of(version: str, says: str) -> None:
    found = versions.notes(version)
    assert (not found and not says) or (says and says in found[0])


def test_a_version_that_cannot_work_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"0\.25\.1 is too old"):
        versions.notes("0.25.1")
