"""The one file: vLLM's own parser reads from it what thaw's settings say, alone and beside another connector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from thaw.engines.vllm import settings
from thaw.engines.vllm.settings import VllmSettings

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # where vLLM 0.26 has it
    from vllm.entrypoints.openai.cli_args import make_arg_parser

WANTED = VllmSettings(mail="/run/user/1/mail box", stores={"3f-a": "/data/it's here"}, arena_nbytes=5, pin_fraction=0.5)


@pytest.fixture(scope="module")
def parse() -> Any:
    """Parse the server's command line, as the server does."""
    parser = make_arg_parser(FlexibleArgumentParser())
    return lambda *words: parser.parse_args(["--model", "m", *words])


def written(folder: Path, text: str) -> str:
    path = folder / "thaw.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_server_reads_what_was_written(parse: Any, tmp_path: Path) -> None:
    read = parse("--config", written(tmp_path, settings.config_file(WANTED)))
    found = read.kv_transfer_config
    assert isinstance(found, KVTransferConfig)
    assert (found.kv_connector, found.kv_connector_module_path) == (settings.CONNECTOR, settings.CONNECTOR_MODULE)
    assert found.kv_role == "kv_both"
    assert settings.from_extra_config(found.kv_connector_extra_config) == WANTED
    assert read.logits_processors == [settings.LOGITS_PROCESSOR]
    assert read.enable_prompt_tokens_details is True


def test_the_command_line_goes_before_the_file(parse: Any, tmp_path: Path) -> None:
    other = json.dumps({"kv_connector": "Other", "kv_role": "kv_both"})
    read = parse("--config", written(tmp_path, settings.config_file(WANTED)), "--kv-transfer-config", other)
    assert read.kv_transfer_config.kv_connector == "Other"


def test_beside_another_connector_the_options_are_the_childs(parse: Any, tmp_path: Path) -> None:
    children = [settings.kv_transfer_config(WANTED), {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}]
    both = {
        "kv-transfer-config": {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": children},
        }
    }
    read = parse("--config", written(tmp_path, json.dumps(both)))
    first, second = (KVTransferConfig(**c) for c in read.kv_transfer_config.kv_connector_extra_config["connectors"])
    assert settings.from_extra_config(first.kv_connector_extra_config) == WANTED
    assert second.kv_connector == "ExampleConnector"


def test_the_engine_takes_the_arguments() -> None:
    arguments: dict[str, Any] = {**settings.engine_args(WANTED)}
    engine = AsyncEngineArgs(model="m", **arguments)
    assert engine.logits_processors == [settings.LOGITS_PROCESSOR]
