"""Model identity: what must be equal for KV to mean the same, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from thaw.core.errors import IdentityMismatch  # noqa: E402
from thaw.core.identity import ModelIdentity, compare  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.hf import weights  # noqa: E402


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a model that a test may change."""
    return Path(
        shutil.copytree(tiny_model("llama"), tmp_path / "model", ignore=shutil.ignore_patterns(weights.CACHE_NAME))
    )


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Every module whose weights were really hashed."""
    calls: list[object] = []
    real = weights.hash_weights

    def counting(module: object) -> str:
        calls.append(module)
        return real(module)

    monkeypatch.setattr(weights, "hash_weights", counting)
    yield calls


def identity_of(model: object, **options: object) -> ModelIdentity:
    with load_engine(
        "transformers", model=model if isinstance(model, torch.nn.Module) else str(model), **options
    ) as engine:
        return engine.identity()


def load(folder: Path) -> torch.nn.Module:
    module: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return module


def test_it_does_not_depend_on_how_the_weights_are_sharded(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert identity_of(folder) == identity_of(tmp_path / "sharded")


def test_it_does_not_depend_on_where_the_model_came_from(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert identity_of(folder) == identity_of(load(folder), tokenizer=tokenizer)


def test_one_changed_element_anywhere_is_another_model(folder: Path) -> None:
    module = load(folder)
    roots = {weights.hash_weights(module)}
    parameters = list(module.parameters())
    for parameter in parameters:
        with torch.no_grad():
            parameter.view(-1)[parameter.numel() // 3] += 0.5
        roots.add(weights.hash_weights(module))
    assert len(roots) == len(parameters) + 1


def test_another_dtype_is_another_identity(folder: Path) -> None:
    with pytest.raises(IdentityMismatch, match=r"bfloat16.*float32"):
        compare(identity_of(folder, dtype="bfloat16"), identity_of(folder))


@pytest.mark.parametrize(("field", "value"), [("rms_norm_eps", 1e-3), ("hidden_act", "gelu")])
def test_a_config_field_that_changes_the_function_is_named(folder: Path, field: str, value: object) -> None:
    before = identity_of(folder)
    _edit(folder / "config.json", field, value)
    with pytest.raises(IdentityMismatch) as refusal:
        compare(before, identity_of(folder))
    assert refusal.value.field == f"config.{field}"


def test_another_rope_is_named(folder: Path) -> None:
    before = identity_of(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123456.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(IdentityMismatch, match=r"config.rope.*123456"):
        compare(before, identity_of(folder))


def test_a_config_field_that_does_not_change_it_does_not_count(folder: Path) -> None:
    before = identity_of(folder)
    _edit(folder / "config.json", "transformers_version", "0.0.0")
    _edit(folder / "config.json", "initializer_range", 0.5)
    assert identity_of(folder) == before


def test_another_tokenizer_or_chat_template_is_named(folder: Path) -> None:
    before = identity_of(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(IdentityMismatch) as refusal:
        compare(before, identity_of(folder))
    assert refusal.value.field == "tokenizer"


def test_the_cache_is_used_by_the_next_boot(folder: Path, hashed: list[object]) -> None:
    first = identity_of(folder)
    assert len(hashed) == 1 and (folder / weights.CACHE_NAME).is_file()
    assert identity_of(folder) == first
    assert len(hashed) == 1


def test_the_cache_is_not_used_for_other_files(folder: Path, hashed: list[object]) -> None:
    first = identity_of(folder)
    module = load(folder)
    with torch.no_grad():
        next(iter(module.parameters())).view(-1)[5] += 1.0
    module.save_pretrained(folder)  # type: ignore[operator]
    changed = identity_of(folder)
    assert len(hashed) == 2 and changed.weights != first.weights
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert identity_of(folder) == changed and len(hashed) == 3, "another mtime: hashed again"
    assert identity_of(folder, dtype="bfloat16").weights != changed.weights and len(hashed) == 4


@pytest.mark.parametrize("junk", ["", "{", "[]", '{"key": 5}', '{"weights": "b3:zz"}'])
def test_a_damaged_cache_is_hashed_over(folder: Path, hashed: list[object], junk: str) -> None:
    first = identity_of(folder)
    (folder / weights.CACHE_NAME).write_text(junk)
    assert identity_of(folder) == first and len(hashed) == 2


def test_a_read_only_model_folder_caches_elsewhere(
    folder: Path, hashed: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))
    (folder / weights.CACHE_NAME).mkdir()
    first = identity_of(folder)
    assert identity_of(folder) == first
    assert len(hashed) == 1 and list((tmp_path / "cache").rglob("*.json"))


def test_weights_changed_in_memory_never_come_from_or_go_into_the_cache(folder: Path, hashed: list[object]) -> None:
    with load_engine("transformers", model=str(folder)) as engine:
        before = engine.identity()
        cached = (folder / weights.CACHE_NAME).read_text()
        with torch.no_grad():
            engine._backend._module.lm_head.weight.mul_(2.0)  # type: ignore[attr-defined]
        assert engine.identity().weights != before.weights
        assert len(hashed) == 2 and (folder / weights.CACHE_NAME).read_text() == cached
    assert identity_of(folder) == before


def _edit(path: Path, field: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
