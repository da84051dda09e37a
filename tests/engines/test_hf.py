"""A Hugging Face folder says the same about its model as the loaded model does, in every version of transformers."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from thaw.core.errors import IncompleteModel, InvalidRequest  # noqa: E402
from thaw.engines.hf import files, weights  # noqa: E402
from thaw.engines.hf.codec import HFCodec  # noqa: E402
from thaw.engines.hf.config import (  # noqa: E402
    check_length,
    eos_of,
    eos_token_ids,
    function_config,
    load_config,
    num_positions,
    overridden,
)
from thaw.engines.hf.files import NotOneToOne, hash_files  # noqa: E402
from thaw.engines.hf.weights import (  # noqa: E402
    CACHE_NAME,
    SAMPLED,
    _spread,
    hash_weights,
    root_of_folder,
    root_of_module,
    sample_weights,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt_neox")
DTYPES = ("bfloat16", "float16", "float32")
GOLDEN = Path(__file__).with_name("golden_identity.json")
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def load(folder: Path, dtype: str = "float32") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def make(folder: Path, arch: str, **options: Any) -> Any:
    """Write a model of random weights into `folder`, as transformers writes it; returns the module."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(arch, **(SMALL | options))
    module = transformers.AutoModelForCausalLM.from_config(config)
    module.save_pretrained(folder)
    return module


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of the one file of `folder`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def assert_straight(folder: Path, dtype: str = "float32") -> None:
    assert hash_files(folder, getattr(torch, dtype)) == hash_weights(load(folder, dtype))


def assert_by_loading(folder: Path, reason: str, caplog: pytest.LogCaptureFixture, dtype: str = "float32") -> None:
    """The files alone do not do: it is said, without the folder's path, and the root is right all the same."""
    with pytest.raises(NotOneToOne, match=reason):
        hash_files(folder, getattr(torch, dtype))
    with caplog.at_level(logging.WARNING, "thaw.engines.hf.weights"):
        assert root_of_folder(folder, dtype) == hash_weights(load(folder, dtype))
    said = [record.getMessage() for record in caplog.records if record.name == "thaw.engines.hf.weights"]
    assert len(said) == 1 and "loaded on the CPU" in said[0] and str(folder) not in said[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_files_alone_give_the_root_of_the_loaded_model(
    arch: str, dtype: str, tiny_model: Callable[..., Path]
) -> None:
    assert_straight(tiny_model(arch), dtype)
    assert_straight(tiny_model(arch, dtype="bfloat16"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_real_models_too(demo_model: Path, dtype: str) -> None:
    assert_straight(demo_model, dtype)


def test_another_dtype_is_another_root_unless_nothing_is_lost(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    assert len({hash_files(folder, getattr(torch, dtype)) for dtype in DTYPES}) == 3


def test_sharded_files_too(tmp_path: Path) -> None:
    module = make(tmp_path / "one", "llama")
    module.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_straight(tmp_path / "sharded")
    assert hash_files(tmp_path / "sharded", torch.float32) == hash_files(tmp_path / "one", torch.float32)


def test_files_that_no_model_is_loaded_from_do_not_count(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    save_file({"tok_embeddings.weight": torch.zeros(3)}, tmp_path / "consolidated.safetensors")
    assert_straight(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_tensors_count_once_under_the_first_name(tmp_path: Path, dtype: str) -> None:
    make(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_straight(tmp_path, dtype)
    root = hash_files(tmp_path, getattr(torch, dtype))
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_straight(tmp_path, dtype)
    edit(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    assert_straight(tmp_path, dtype)
    assert hash_files(tmp_path, getattr(torch, dtype)) == root


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    """transformers runs both, vLLM and SGLang the embedding twice: there is no one model in such files."""
    make(tmp_path, "llama", tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(IncompleteModel, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        root_of_folder(tmp_path, "float32")


def test_the_root_is_of_the_config_too(tmp_path: Path) -> None:
    """A head that equals the embedding counts once where the config ties it, and that root is not kept for both."""
    make(tmp_path, "llama")
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    untied = root_of_folder(tmp_path, "float32")
    set_config(tmp_path, tie_word_embeddings=True)
    assert root_of_folder(tmp_path, "float32") == hash_weights(load(tmp_path)) != untied


def test_fields_that_an_engine_overrides_are_those_of_a_folder_that_says_them(tmp_path: Path) -> None:
    make(tmp_path / "said", "llama")
    shutil.copytree(tmp_path / "said", tmp_path / "plain")
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 5e5}
    set_config(tmp_path / "said", rope_parameters=rope, rms_norm_eps=1e-3)
    said = load_config(tmp_path / "said")
    overrides = overridden(said, ("rope_scaling", "rms_norm_eps", "no_such_field"))
    assert overrides.keys() == {"rope_parameters", "rms_norm_eps"}
    found = load_config(tmp_path / "plain", overrides)
    assert function_config(found.to_dict()) == function_config(said.to_dict())
    assert function_config(load_config(tmp_path / "plain").to_dict()) != function_config(said.to_dict())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({}, None),
        ({"max_position_embeddings": 512, "rope_scaling": YARN}, 2048),
        ({"max_position_embeddings": 2048, "rope_parameters": YARN}, 2048),
        ({"max_position_embeddings": 640, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 2560),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 2.5}}, 1280),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "factor": None}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {"full": YARN, "sliding": {"rope_type": "default"}}}, 512),
    ],
)
def test_a_stretched_rope_has_the_positions_that_model_cards_say(config: dict[str, Any], positions: int | None) -> None:
    assert num_positions(config) == positions
    check_length(config, positions)
    check_length(config, None)
    for wrong in (0, -1, "12", True, *(() if positions is None else (positions + 1,))):
        with pytest.raises(InvalidRequest, match="max_model_len"):
            check_length(config, wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_persistent_buffers_count(tmp_path: Path, dtype: str) -> None:
    module = make(tmp_path, "apertus", num_key_value_heads=2)
    persistent = [name for name, _ in module.named_buffers() if name in module.state_dict()]
    assert persistent
    assert_straight(tmp_path, dtype)
    before = hash_files(tmp_path, getattr(torch, dtype))
    edit(tmp_path, lambda t: t[persistent[0]].add_(1))
    assert hash_files(tmp_path, getattr(torch, dtype)) != before
    assert_straight(tmp_path, dtype)


def test_one_changed_element_anywhere_changes_the_root(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    roots = {hash_files(tmp_path, torch.float32)}
    names = sorted(load_file(tmp_path / "model.safetensors"))
    for name in names:
        edit(tmp_path, lambda t, name=name: t[name].view(-1)[1].add_(0.5))  # type: ignore[misc]
        roots.add(hash_files(tmp_path, torch.float32))
    assert len(roots) == len(names) + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_transformers_renames(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    """GPT-NeoX's head is `embed_out` in files and `lm_head` in the module."""
    folder = shutil.copytree(tiny_model("gpt_neox"), tmp_path / "m", ignore=shutil.ignore_patterns(CACHE_NAME))
    assert_by_loading(folder, r"embed_out\.weight", caplog, dtype)


def test_files_of_the_body_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "llama", tie_word_embeddings=True).model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    assert_by_loading(tmp_path, "tensors that it does not have", caplog)


def test_tensors_that_the_module_does_not_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "llama")
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_by_loading(tmp_path, "inv_freq", caplog)


def test_tensors_that_are_merged_when_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "qwen3_moe", num_experts=4, moe_intermediate_size=16, num_key_value_heads=2, head_dim=8)
    assert_by_loading(tmp_path, "merged or reordered", caplog)


def test_other_formats_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = make(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    assert_by_loading(tmp_path, r"no model\.safetensors", caplog)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(33)}), r"shape \[33\], not \[32\]"),
    ],
)
def test_files_of_another_model_are_not_hashed_straight(tmp_path: Path, change: Any, reason: str) -> None:
    make(tmp_path, "llama")
    edit(tmp_path, change)
    with pytest.raises(NotOneToOne, match=reason):
        hash_files(tmp_path, torch.float32)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        root_of_folder(tmp_path / "nothing", "float32")


def test_the_next_boot_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "llama")
    root = root_of_folder(tmp_path, "float32")
    monkeypatch.setattr(files, "hash_files", lambda *_: pytest.fail("read again"))
    assert root_of_folder(tmp_path, "float32") == root


def rewrite(file: Path, data: bytes) -> None:
    """Other bytes of the same number, with the times that the file had, as far as they can be put back."""
    status = file.stat()
    assert len(data) == status.st_size
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kept", ["model.safetensors", "pytorch_model.bin"])
def test_other_weights_of_the_same_size_and_mtime_have_another_root(tmp_path: Path, kept: str) -> None:
    """Archives and images give every file one mtime."""
    make(tmp_path / "a", "llama")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit(tmp_path / "b", lambda t: t["model.norm.weight"].add_(1))
    if kept.endswith(".bin"):  # beside a file that no model is loaded from
        for folder in (tmp_path / "a", tmp_path / "b"):
            torch.save(load_file(folder / "model.safetensors"), folder / kept)
            (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
        shutil.copy(tmp_path / "a" / "consolidated.safetensors", tmp_path / "b")
    root = root_of_folder(tmp_path / "a", "float32")
    rewrite(tmp_path / "a" / kept, (tmp_path / "b" / kept).read_bytes())
    assert root_of_folder(tmp_path / "a", "float32") == root_of_folder(tmp_path / "b", "float32") != root


def test_another_index_over_the_same_files_is_another_root(tmp_path: Path) -> None:
    module = make(tmp_path / "a", "llama")
    module.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    with torch.no_grad():
        module.model.norm.weight.add_(1)
    module.save_pretrained(tmp_path / "other", max_shard_size="10KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    root, said = root_of_folder(tmp_path / "m", "float32"), json.loads(index.read_text())
    for file in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "m" / f"other-{file.name}")
    assert root_of_folder(tmp_path / "m", "float32") == root
    said["weight_map"] = {name: f"other-{file}" for name, file in said["weight_map"].items()}
    index.write_text(json.dumps(said))
    assert root_of_folder(tmp_path / "m", "float32") == root_of_folder(tmp_path / "other", "float32") != root


def test_a_folder_and_a_loaded_module_share_the_cache(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "m", ignore=shutil.ignore_patterns(CACHE_NAME)))
    root = root_of_folder(folder, "bfloat16")
    module = load(folder, "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(weights, "hash_weights", lambda module: pytest.fail("hashed again"))
        assert root_of_module(module, folder) == root
    (folder / CACHE_NAME).unlink()
    assert root_of_module(module, folder) == root
    cached = (folder / CACHE_NAME).read_bytes()
    assert root_of_folder(folder, "bfloat16") == root and (folder / CACHE_NAME).read_bytes() == cached


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": 7}, {"eos_token_id": [7, 9]}])
def test_the_ends_of_text_are_those_of_the_loaded_model(
    arch: str, generation: dict[str, Any] | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model(arch), tmp_path / "m"))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    module = load(folder)
    assert eos_token_ids(folder) == eos_of(module.generation_config, module.config)


def say(folder: Path) -> dict[str, Any]:
    """What of the identity transformers' version could change; the root of the weights follows from the tests above."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    module = load(folder)
    return {
        "architecture": type(module).__name__,
        "config": function_config(module.config.to_dict()),
        "tokenizer": HFCodec(tokenizer).identity(),
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_version_of_transformers_says_the_same(arch: str, tiny_model: Callable[..., Path]) -> None:
    """See docs/design/0003-identity-across-versions.md before changing what is golden."""
    assert say(tiny_model(arch)) == json.loads(GOLDEN.read_text())[arch]


def test_of_smollm2_too(demo_model: Path) -> None:
    golden = json.loads(GOLDEN.read_text())["SmolLM2-135M-Instruct"]
    assert {**say(demo_model), "weights": root_of_folder(demo_model, "bfloat16")} == golden


def test_a_field_said_again_beside_the_rope_does_not_count() -> None:
    """transformers 5.19 repeats it, 5.23 does not."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
    once = function_config({"hidden_size": 32, "rope_parameters": rope})
    assert function_config({"hidden_size": 32, "rope_parameters": rope, "partial_rotary_factor": 0.4}) == once
    twice = function_config({"hidden_size": 32, "rope_parameters": rope, "partial_rotary_factor": 0.5})
    assert twice == {**once, "partial_rotary_factor": "0.5"}, "where they differ, nothing is left out"
    assert function_config({"partial_rotary_factor": 0.5, "rope_parameters": None})["partial_rotary_factor"] == "0.5"
    assert "0.4" in once["rope_parameters"], "and the rope's own value always counts"


def test_fields_that_are_not_known_to_be_harmless_count() -> None:
    assert function_config({"a_field_of_tomorrow": None}) == {"a_field_of_tomorrow": "null"}


def odd_tensors() -> torch.nn.Module:
    """One of each kind: rows, a transposed one, one repeated by its strides, a scalar, an empty one, other dtypes."""
    module = torch.nn.Module()
    whole = torch.arange(1200.0).reshape(30, 40)
    for name, tensor in {"rows": whole, "columns": whole[3:, 7:].T, "one": torch.tensor(3.0)}.items():
        module.register_parameter(name, torch.nn.Parameter(tensor))
    for name, tensor in {
        "repeated": torch.arange(5).expand(4, 5), "none": torch.zeros(0, 3),
        "short": torch.ones(70, dtype=torch.bfloat16), "flags": torch.tensor([True, False]),
    }.items():  # fmt: skip
        module.register_buffer(name, tensor)
    return module


def test_the_sample_of_weights_looks_at_elements_spread_over_every_tensor() -> None:
    module = odd_tensors()
    for tensor in (*module.parameters(), *module.buffers()):
        flat = tensor.detach().reshape(-1)
        assert torch.equal(_spread(tensor.detach()), flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED])
    seen = {sample_weights(module)}
    for tensor in (module.rows, module.columns, module.one, module.short, module.flags):
        with torch.no_grad():
            tensor[(0,) * tensor.dim()] = not tensor[(0,) * tensor.dim()]
        seen.add(sample_weights(module))
    module.rows = torch.nn.Parameter(module.rows.detach() + 1)
    seen.add(sample_weights(module))
    assert len(seen) == 7 and sample_weights(module) in seen
