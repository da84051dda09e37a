"""The small files beside a model's weights: one that is damaged is refused by name, by whatever reads it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from thaw import doctor, load_engine
from thaw.core.errors import IncompleteModel, InvalidRequest, ThawError, Unsupported
from thaw.engines.hf import beside
from thaw.engines.hf.checkpoint import require_whole
from thaw.engines.hf.config import eos_token_ids
from thaw.engines.hf.tokenizer import load_tokenizer
from thaw.engines.hf.weights import CACHE_NAME

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 538090408\n"
GENERATION, CONFIG, TOKENIZER = "generation_config.json", "config.json", "tokenizer.json"
TOKENIZER_CONFIG, SPECIAL, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model", ignore=shutil.ignore_patterns(CACHE_NAME)))


def fields(folder: Path, name: str, **more: Any) -> str:
    """The text of a JSON file with `more` in it."""
    path = folder / name
    return json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **more})


def boot(folder: Path) -> tuple[int, ...]:
    """The stop set of the engine that boots."""
    with load_engine("transformers", model=str(folder)) as engine:
        return engine.info.eos_token_ids


DAMAGED: dict[str, tuple[str, str | bytes | dict[str, Any], str]] = {
    "ends, cut short": (GENERATION, '{"eos_token_id": [65, 66]', "is not JSON.*cut short"),
    "ends, empty": (GENERATION, "", r"generation_config\.json \(0 characters\) is not JSON"),
    "ends, no object": (GENERATION, "[]", "holds no JSON object but a list"),
    "ends, a pointer": (GENERATION, POINTER, "Git LFS pointer.*git lfs pull"),
    "ends, in UTF-16": (GENERATION, '{"eos_token_id": 65}'.encode("utf-16"), "not text in UTF-8"),
    "ends, with a mark in front": (GENERATION, b'\xef\xbb\xbf{"eos_token_id": 65}', "is not JSON.*BOM"),
    "ends, of brackets": (GENERATION, "[" * 100_000, "is not JSON"),
    "an end by name": (GENERATION, {"eos_token_id": "</s>"}, r"got `str` - at `\$\.eos_token_id`"),
    "ends by name": (GENERATION, {"eos_token_id": [2, "</s>"]}, r"\$\.eos_token_id\[1\]"),
    "ends in ends": (GENERATION, {"eos_token_id": [[2]]}, r"\$\.eos_token_id\[0\]"),
    "a broken end": (GENERATION, {"eos_token_id": 2.5}, "got `float`"),
    "a true end": (GENERATION, {"eos_token_id": True}, "got `bool`"),
    "an end with fields": (GENERATION, {"eos_token_id": {"a": 1}}, "got `object`"),
    "config, no object": (CONFIG, "[]", "holds no JSON object but a list"),
    "config, cut short": (CONFIG, '{"model_type": "lla', "is not JSON.*cut short"),
    "config, an end by name": (CONFIG, {"eos_token_id": "x"}, r"\$\.eos_token_id"),
    "config, one architecture": (CONFIG, {"architectures": "LlamaForCausalLM"}, r"\$\.architectures"),
    "config, a type by number": (CONFIG, {"model_type": 5}, r"\$\.model_type"),
    "config, a list of quantisations": (CONFIG, {"quantization_config": [1]}, r"\$\.quantization_config"),
    "tokenizer, cut short": (TOKENIZER, '{"version": "1.0", "trunc', r"tokenizer\.json is no tokenizer.*cut short"),
    "tokenizer, no object": (TOKENIZER, "[]", "is no tokenizer"),
    "tokenizer, a pointer": (TOKENIZER, POINTER, "Git LFS pointer"),
    "tokens, no object": (TOKENIZER_CONFIG, "[]", "holds no JSON object but a list"),
    "tokens, cut short": (TOKENIZER_CONFIG, '{"eos', "is not JSON"),
    "an end token by number": (TOKENIZER_CONFIG, {"eos_token": 5}, r"\$\.eos_token"),
    "an end token of no content": (TOKENIZER_CONFIG, {"eos_token": {"lstrip": True}}, "`content`"),
    "a list of added tokens": (TOKENIZER_CONFIG, {"added_tokens_decoder": [1]}, r"\$\.added_tokens_decoder"),
    "an added token at no id": (TOKENIZER_CONFIG, {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens"),
    "an added token of no content": (TOKENIZER_CONFIG, {"added_tokens_decoder": {"300": {}}}, "`content`"),
    "an added token as text": (TOKENIZER_CONFIG, {"added_tokens_decoder": {"300": "a"}}, "got `str`"),
    "a template by number": (TOKENIZER_CONFIG, {"chat_template": 5}, r"\$\.chat_template"),
    "a template of no name": (TOKENIZER_CONFIG, {"chat_template": [{"template": "a"}]}, "`name`"),
    "a named template by number": (TOKENIZER_CONFIG, {"chat_template": [{"name": "a", "template": 5}]}, "got `int`"),
    "special tokens, no object": (SPECIAL, "[]", "holds no JSON object but a list"),
    "special tokens, cut short": (SPECIAL, '{"eos', "is not JSON"),
    "template, no text": (TEMPLATE, b"\xff\xfe{{", r"chat_template\.jinja is not text in UTF-8"),
    "template, a pointer": (TEMPLATE, POINTER, "Git LFS pointer"),
    "another template, no text": ("additional_chat_templates/tool_use.jinja", b"\xff", "not text in UTF-8"),
}  # fmt: skip
OF_THE_TOKENIZER = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL, TEMPLATE, "additional_chat_templates/tool_use.jinja")


@pytest.mark.slow("reads a model many times")
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_by_name(folder: Path, case: str) -> None:
    name, content, reason = DAMAGED[case]
    said = fields(folder, name, **content) if isinstance(content, dict) else content
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(said.encode() if isinstance(said, str) else said)
    readers: list[Callable[[Path], object]] = [boot, require_whole]  # the latter is what vLLM and SGLang are asked
    if name in OF_THE_TOKENIZER:
        readers.append(lambda folder: load_tokenizer(str(folder)))  # a client's, without transformers
    if name == GENERATION:
        readers.append(eos_token_ids)
    for read in readers:
        with pytest.raises(IncompleteModel, match=f"(?s){reason}") as error:
            read(folder)
        assert str(folder / name) in str(error.value)
    if name == CONFIG:
        with pytest.raises(InvalidRequest, match=f"(?s){reason}"):
            doctor.examine(config=folder, measure=False)
        return
    found = doctor.examine(config=folder, measure=False).finding("model-files")
    assert found is not None and found.status == "problem" and str(folder / name) in found.text


STRANGE: dict[str, Callable[[Path], object]] = {
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("name", [GENERATION, CONFIG, TOKENIZER, TEMPLATE, "model.safetensors"])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_is_refused_by_name_and_never_waited_for(folder: Path, kind: str, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    STRANGE[kind](folder / name)
    for read in (boot, require_whole, *([lambda f: load_tokenizer(str(f))] if name in OF_THE_TOKENIZER else [])):
        with pytest.raises(IncompleteModel, match=r"a link to .* which is not there|is no file but"):
            read(folder)


def test_what_nobody_reads_may_be_anything(folder: Path) -> None:
    (folder / "train_results.json").write_text("{")
    (folder / "notes.txt").symlink_to("nowhere")
    (folder / GENERATION).write_text(fields(folder, GENERATION, temperature="x", eos_token_id=[7, 999_999, -1]))
    (folder / TOKENIZER_CONFIG).write_text(fields(folder, TOKENIZER_CONFIG, extra=[1], pad_token=None))
    require_whole(folder)
    assert 7 in boot(folder)


@pytest.mark.parametrize("name", [GENERATION, CONFIG, TOKENIZER, TOKENIZER_CONFIG])
def test_files_of_a_hub_id_are_refused_by_name_too(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "hub" / "models--org--m"
    shutil.copytree(folder, home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    boot(Path("org/m"))
    (home / "snapshots" / ("a" * 40) / name).write_text("[]")
    with pytest.raises(IncompleteModel, match=name):
        boot(Path("org/m"))


def test_tokenizers_that_only_transformers_reads_are_ours_to_refuse(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    (folder / "vocab.json").write_text('{"a": "b"}')
    (folder / "merges.txt").write_text("x")
    (folder / TOKENIZER_CONFIG).write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    for read in (boot, lambda folder: load_tokenizer(str(folder))):
        with pytest.raises(IncompleteModel, match="transformers cannot read the tokenizer"):
            read(folder)


NONSENSE: dict[str, dict[str, Any]] = {
    "layers by name": {"num_hidden_layers": "x"},
    "no heads": {"num_attention_heads": 0},
    "no vocabulary": {"vocab_size": -1},
    "a list of ropes": {"rope_parameters": [1]},
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_config_that_makes_no_sense_is_said_to_make_none(folder: Path, case: str) -> None:
    (folder / CONFIG).write_text(fields(folder, CONFIG, **NONSENSE[case]))
    for read in (boot, require_whole):
        with pytest.raises(InvalidRequest, match="makes no sense"):
            read(folder)


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers asks at the terminal, and runs it at a "y"."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Own", None]}
    (folder / TOKENIZER_CONFIG).write_text(fields(folder, TOKENIZER_CONFIG, auto_map=code, tokenizer_class="Own"))
    for read in (boot, lambda folder: load_tokenizer(str(folder))):
        with pytest.raises(Unsupported, match="comes with code of its own"):
            read(folder)
    (folder / CONFIG).write_text(fields(folder, CONFIG, auto_map=code, model_type="own"))
    with pytest.raises(Unsupported, match="thaw does not run models of type own yet"):
        boot(folder)
    require_whole(folder)
    assert not (folder / "ran").exists() and "[y/N]" not in capsys.readouterr().out


READ = """
import sys
from thaw import doctor, load_engine
from thaw.core.errors import StorageFailed
from thaw.engines.hf.checkpoint import require_whole
from thaw.engines.hf.tokenizer import load_tokenizer
boot, examine = (lambda f: load_engine("transformers", model=f)), (lambda f: doctor.examine(config=f, measure=False))
for folder in sys.argv[1:]:
    for read in (boot, require_whole, load_tokenizer, examine):
        try:
            report = read(folder)
            assert not report.ok, "it was read"
            print(report.finding("model-files").text)
        except StorageFailed as error:
            print(error)
"""
AS_A_USER = () if os.getuid() else ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""In front of a command: root may read everything, and these rights are what it does so by."""


@pytest.mark.skipif(bool(AS_A_USER) and shutil.which("setpriv") is None, reason="root may read everything")
@pytest.mark.slow("a process of its own")
def test_what_this_user_may_not_read_is_said_so(folder: Path) -> None:
    (folder / TEMPLATE).write_text("{{ messages }}")
    closed = {name: Path(shutil.copytree(folder, folder.parent / name)) for name in ("all", TOKENIZER, TEMPLATE)}
    for name, copy in closed.items():
        (copy if name == "all" else copy / name).chmod(0)
    program = [*AS_A_USER, sys.executable, "-c", READ, *map(str, closed.values())]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    closed["all"].chmod(0o700)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert len(said) == 12 and all("cannot read" in line and "EACCES" in line for line in said), said


def test_a_file_of_endless_size_is_not_taken_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "MAX_NBYTES", 1000)
    os.truncate(folder / GENERATION, 10_000)
    with pytest.raises(IncompleteModel, match="has more than 1,000 bytes"):
        beside.read_object(folder / GENERATION)


@pytest.mark.slow("reads a model many times")
def test_only_our_errors_come_of_any_bytes(folder: Path) -> None:
    for name in (*beside.FIELDS, TOKENIZER, TEMPLATE):
        for data in (b"", b"{}", b"null", b"7", b'"x"', b"[" * 10_000, b"\xff", b"{" * 10_000, b'{"a": NaN}'):
            copy = Path(shutil.copytree(folder, folder.parent / "copy"))
            (copy / name).write_bytes(data)
            for read in (require_whole, boot, lambda folder: load_tokenizer(str(folder))):
                with contextlib.suppress(ThawError):
                    read(copy)
            shutil.rmtree(copy)
