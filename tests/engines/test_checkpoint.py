"""A model whose files are not those of its config does not run, and no root of weights is given for it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from thaw import doctor, load_engine  # noqa: E402
from thaw.core.errors import IncompleteModel, InvalidRequest, NotFound, ThawError, Unsupported  # noqa: E402
from thaw.doctor import model as doctor_model  # noqa: E402
from thaw.engines.hf.checkpoint import require_weights_of, require_whole  # noqa: E402
from thaw.engines.hf.weights import CACHE_NAME, root_of_folder  # noqa: E402

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 538090408\n"
Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a model with a head of its own that a test may change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model", ignore=shutil.ignore_patterns(CACHE_NAME)))


def tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        found = load_file(folder / FILE)
        change(found)
        save_file({name: t.clone() for name, t in found.items()}, folder / FILE, metadata={"format": "pt"})

    return apply


def config(**fields: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return apply


def sharded(change: Change = lambda folder: None) -> Change:
    def apply(folder: Path) -> None:
        module = transformers.AutoModelForCausalLM.from_pretrained(folder)
        (folder / FILE).unlink()
        module.save_pretrained(folder, max_shard_size="100KB")
        change(folder)

    return apply


def as_bin(change: Change = lambda folder: None) -> Change:
    def apply(folder: Path) -> None:
        torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
        (folder / FILE).unlink()
        change(folder)

    return apply


def cut(name: str, nbytes: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:nbytes])


def pointer(name: str) -> Change:
    return lambda folder: (folder / name).write_text(POINTER)


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def indexed(change: Callable[[Path, dict[str, Any]], object]) -> Change:
    """Shards whose index `change` gets to see; it is rewritten."""

    def apply(folder: Path) -> None:
        said = json.loads((folder / INDEX).read_text())
        change(folder, said)
        (folder / INDEX).write_text(json.dumps(said))

    return sharded(apply)


def twice(first: str) -> Change:
    """NORM stands in a shard of its own as well, where the index names it; `first` is the first file by name."""

    def change(folder: Path, said: dict[str, Any]) -> None:
        own = "model-00000-of-00008.safetensors" if first == "named" else "model-00009-of-00008.safetensors"
        save_file({NORM: torch.full((64,), 5.0)}, folder / own, metadata={"format": "pt"})
        said["weight_map"][NORM] = own

    return indexed(change)


def of_dtype(dtype: torch.dtype, name: str = "model.norm.weight") -> Change:
    return tensors(lambda t: t.update({name: torch.ones(t[name].shape).to(dtype)}))


NORM = "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
LACKING: dict[str, tuple[Change, str]] = {
    "no head": (tensors(lambda t: t.pop("lm_head.weight")), r"lm_head\.weight.*tie_word_embeddings to true"),
    "no layer": (tensors(lambda t: [t.pop(n) for n in list(t) if "layers.2." in n]), "9 tensors are missing"),
    "more layers": (config(num_hidden_layers=4), r"9 tensors are missing.*layers\.3\."),
    "fewer layers": (config(num_hidden_layers=2), r"no place for 9 tensors.*layers\.2\."),
    "a tensor too many": (tensors(lambda t: t.update({BIAS: torch.ones(64)})), r"no place for 1 tensor.*q_proj\.bias"),
    "another shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(33)})), r"model\.norm\.weight.*\[33\].*\[64\]",
    ),
    "tied and different": (config(tie_word_embeddings=True), r"ties lm_head\.weight.*to false"),
    "no head, sharded": (
        sharded(lambda folder: [p.unlink() for p in folder.glob("model-*") if "lm_head.weight" in load_file(p)]),
        "model-.*missing",
    ),
    "no head, pickled": (
        as_bin(lambda f: torch.save(
            {n: t for n, t in torch.load(f / "pytorch_model.bin").items() if n != "lm_head.weight"},
            f / "pytorch_model.bin",
        )), r"lm_head\.weight",
    ),
}  # fmt: skip
UNREADABLE: dict[str, tuple[Change, str]] = {
    "a pointer": (pointer(FILE), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    "a pointer among shards": (sharded(lambda f: second_shard(f).write_text(POINTER)), "model-00002-.*Git LFS pointer"),
    "the tokenizer a pointer": (pointer("tokenizer.json"), r"tokenizer\.json is a Git LFS pointer"),
    "the config a pointer": (pointer("config.json"), r"config\.json is a Git LFS pointer"),
    "half of it": (cut(FILE, 50_000), r"model\.safetensors \(50000 bytes\).*cut short"),
    "half of its header": (cut(FILE, 100), "cut short"),
    "nothing of it": (cut(FILE, 0), r"model\.safetensors \(0 bytes\)"),
    "half of a shard": (sharded(lambda f: cut(second_shard(f).name, 9_000)(f)), "model-00002-.*cut short"),
    "a shard is missing": (sharded(lambda f: second_shard(f).unlink()), r"index\.json names 8 files.*model-00002-"),
    "no index": (sharded(lambda f: (f / INDEX).write_text("{")), "no index of weights"),
    "an index of nothing": (sharded(lambda f: (f / INDEX).write_text("{}")), "no index of weights"),
    "half of a pickle": (as_bin(cut("pytorch_model.bin", 50_000)), r"pytorch_model\.bin \(50000 bytes\)"),
}  # fmt: skip
NOT_FLOATS = ("int8", "uint8", "int64", "bool", "float8_e4m3fn", "complex64")
UNCLEAR: dict[str, tuple[Change, str]] = {
    "a tensor twice, the named first": (twice("named"), r"model\.norm\.weight is in model-.* and in model-"),
    "a tensor twice, the named last": (twice("other"), r"model\.norm\.weight is in model-.* and in model-"),
    "another shard than is named": (
        indexed(lambda f, said: said["weight_map"].update({NORM: sorted(said["weight_map"].values())[0]})),
        r"says that model\.norm\.weight is in model-00001-.*, and it is in model-0000[2-8]-",
    ),
    "named and not there": (
        indexed(lambda f, said: said["weight_map"].update({BIAS: sorted(said["weight_map"].values())[0]})),
        r"says that .*q_proj\.bias is in model-00001-.*, and it is not there",
    ),
    "a shard elsewhere": (
        indexed(lambda f, said: said["weight_map"].update({NORM: "../m/model.safetensors"})), "is no file beside it",
    ),
    "an index of a list": (sharded(lambda f: (f / INDEX).write_text("[]")), "no index of weights"),
    "an index of numbers": (sharded(lambda f: (f / INDEX).write_text('{"weight_map": {"a": 5}}')), "no index of"),
    "a pickle of a list": (as_bin(lambda f: torch.save([1], f / "pytorch_model.bin")), "cannot be read as weights"),
    "files that the config names": (config(transformers_weights="own.safetensors"), "transformers_weights"),
    **{
        f"a norm of {name}": (of_dtype(getattr(torch, name)), r"have model\.norm\.weight in .*not say that weights are")
        for name in NOT_FLOATS
    },
    "all of int8": (
        tensors(lambda t: t.update({n: one.to(torch.int8) for n, one in t.items()})), r"lm_head\.weight in I8",
    ),
    "a pickled norm of int8": (
        as_bin(lambda f: torch.save(
            {n: t.to(torch.int8) if n == NORM else t for n, t in torch.load(f / "pytorch_model.bin").items()},
            f / "pytorch_model.bin",
        )), r"have model\.norm\.weight in torch\.int8",
    ),
}  # fmt: skip
CHANGES = {**LACKING, **UNREADABLE, **UNCLEAR}


@pytest.mark.slow("writes and reads many models")
@pytest.mark.parametrize("name", CHANGES)
def test_files_that_are_not_those_of_the_config_are_refused_by_name(folder: Path, name: str) -> None:
    change, reason = CHANGES[name]
    change(folder)
    for ask in (
        lambda: load_engine("transformers", model=str(folder)),
        lambda: require_whole(folder),  # what vLLM and SGLang are asked before they boot, and in them
        lambda: root_of_folder(folder, "float32"),
    ):
        with pytest.raises(IncompleteModel, match=reason):
            ask()
    assert not (folder / CACHE_NAME).exists(), "no root is kept of it"


WHOLE: dict[str, Change] = {
    "one file": lambda folder: None,
    "sharded": sharded(),
    "pickled": as_bin(),
    "a buffer of old checkpoints": tensors(
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    ),
    "a tensor that the index leaves out": indexed(lambda f, said: said["weight_map"].pop(NORM)),
    "floats of other sizes": tensors(lambda t: t.update({NORM: t[NORM].double()})),
    "another format beside it": lambda folder: (folder / "pytorch_model.bin").write_text(POINTER),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_boots_however_it_is_kept(folder: Path, name: str) -> None:
    root = root_of_folder(folder, "float32")
    (folder / CACHE_NAME).unlink()
    WHOLE[name](folder)
    require_whole(folder)
    with load_engine("transformers", model=str(folder)) as engine:
        assert engine.identity().weights == root


def test_tied_tensors_may_be_there_once_or_twice(folder: Path) -> None:
    config(tie_word_embeddings=True)(folder)
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))(folder)
    require_whole(folder)
    tensors(lambda t: t.pop("lm_head.weight"))(folder)
    require_whole(folder)


BESIDE: dict[str, Change] = {
    "a second model": lambda f: shutil.copy(f / FILE, f / "other.safetensors"),
    "an index of others": lambda f: (
        shutil.copy(f / FILE, f / "other.safetensors"),
        (f / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {NORM: "other.safetensors"}})),
    ),
    "another format": as_bin(lambda f: save_file({NORM: torch.ones(64)}, f / "other.safetensors")),
    "a second pickle": as_bin(lambda f: shutil.copy(f / "pytorch_model.bin", f / "other.bin")),
}


@pytest.mark.parametrize("name", BESIDE)
def test_files_of_which_engines_load_others_run_in_none_that_is_served(folder: Path, name: str) -> None:
    """transformers loads model.safetensors; vLLM and SGLang load every file there is, or those of the index."""
    root = root_of_folder(folder, "float32")
    BESIDE[name](folder)
    with load_engine("transformers", model=str(folder)) as engine:
        assert engine.identity().weights == root
    with pytest.raises(IncompleteModel, match="others that vLLM and SGLang load"):
        require_whole(folder)
    said = [f for f in doctor.examine(config=folder, measure=False).findings if f.name == "model-files"]
    assert [f.status for f in said] == ["ok", "warning"] and "vLLM and SGLang refuse it" in said[1].text


def test_what_is_no_models_may_stand_beside_it(folder: Path) -> None:
    as_bin(lambda f: (f / "training_args.bin").write_bytes(b"x"))(folder)
    require_whole(folder)


def test_a_checkpoint_that_says_how_it_is_quantised_may_hold_integers(folder: Path) -> None:
    """Whether an engine runs it is that engine's to say."""
    of_dtype(torch.int8)(folder)
    config(quantization_config={"quant_method": "compressed-tensors"})(folder)
    require_whole(folder)
    with pytest.raises(Unsupported, match="quantised"):
        load_engine("transformers", model=str(folder))


def test_masks_of_old_checkpoints_may_be_of_integers(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = transformers.AutoConfig.for_model("gpt_neox", vocab_size=64, **shape)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    mask, bias = "gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.query_key_value.bias"
    tensors(lambda t: t.update({mask: torch.ones(1, 1, 8, 8, dtype=torch.uint8)}))(tmp_path)
    require_whole(tmp_path)
    of_dtype(torch.uint8, bias)(tmp_path)
    with pytest.raises(IncompleteModel, match=r"query_key_value\.bias in U8"):
        require_whole(tmp_path)


def test_an_adapter_beside_a_model_is_refused_in_every_engine(folder: Path) -> None:
    """transformers puts it on where PEFT is installed, and leaves it out where not; vLLM and SGLang leave it out."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for ask in (
        require_whole,
        lambda f: load_engine("transformers", model=str(f)),
        lambda f: root_of_folder(f, "float32"),
    ):
        with pytest.raises(Unsupported, match=r"holds an adapter.*merge_and_unload"):
            ask(folder)
    (found,) = doctor_model.files(folder, doctor_model.report(*doctor_model.read_config(folder)))
    assert found.status == "problem" and "holds an adapter" in found.text
    for file in (FILE, "config.json"):
        (folder / file).unlink()
    with pytest.raises(Unsupported, match="holds an adapter"):
        load_engine("transformers", model=str(folder))


def test_an_index_that_transformers_does_not_read_is_named(folder: Path) -> None:
    indexed(lambda f, said: said.pop("metadata"))(folder)
    require_whole(folder)
    with pytest.raises(IncompleteModel, match="has no 'metadata'"):
        load_engine("transformers", model=str(folder))


@pytest.mark.parametrize("name", CHANGES)
def test_the_doctor_says_what_a_boot_would(folder: Path, name: str) -> None:
    CHANGES[name][0](folder)
    with pytest.raises(ThawError) as refused:
        load_engine("transformers", model=str(folder))
    try:
        (found,) = doctor_model.files(folder, doctor_model.report(*doctor_model.read_config(folder)))
    except InvalidRequest as error:  # the config itself
        assert str(error) == str(refused.value)
        return
    assert (found.status, found.text) == ("problem", str(refused.value))


VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "as it is": ({}, True),
    "grouped": ({"num_key_value_heads": 1}, False),
    "a body": ({"architectures": ["LlamaModel"]}, False),
    "of no architecture": ({"architectures": None}, True),
    "heads of less than nothing": ({"head_dim": -1}, False),
    "quantised by nothing": ({"quantization_config": {}}, False),
    "in double": ({"dtype": "float64"}, False),
    "in half": ({"dtype": "float16"}, True),
    "in its own": ({"torch_dtype": "auto"}, True),
    "in nothing known": ({"dtype": "bogus"}, False),
    "attention that is not installed": ({"attn_implementation": "flash_attention_2"}, True),
    "a rope of no kind": ({"rope_scaling": {"rope_type": "bogus"}}, False),
    "a pad beyond the words": ({"pad_token_id": 10**6}, False),
    "another class of the same shapes": ({"model_type": "qwen3"}, False),
    "no class at all": ({"model_type": ""}, False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_doctor_and_a_boot_say_the_same_of_a_config(folder: Path, name: str) -> None:
    fields, runs = VARIANTS[name]
    config(**fields)(folder)
    try:
        report = doctor_model.report(*doctor_model.read_config(folder))
        supported = report.supported and next(doctor_model.files(folder, report)).status == "ok"
    except InvalidRequest:
        supported = False
    assert supported == runs
    if not runs:
        with pytest.raises(ThawError):
            load_engine("transformers", model=str(folder))
        return
    load_engine("transformers", model=str(folder)).close()


def test_the_doctor_of_a_whole_folder_says_that_it_is_whole(folder: Path) -> None:
    report = doctor.examine(config=folder, measure=False)
    found = report.finding("model-files")
    assert report.ok and found is not None and found.status == "ok"
    assert doctor.examine(config=folder / "config.json", measure=False).finding("model-files") is None
    (folder / FILE).unlink()
    found = doctor.examine(config=folder, measure=False).finding("model-files")
    assert found is not None and found.status == "warning" and "no weights" in found.text


def test_names_that_only_transformers_finds_are_refused_elsewhere(folder: Path) -> None:
    """vLLM does not boot with them; SGLang boots, and runs what was in memory."""
    config(tie_word_embeddings=True)(folder)
    tensors(lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))(folder)
    with load_engine("transformers", model=str(folder)):
        pass
    with pytest.raises(IncompleteModel, match=r"have lm_head\.weight and not model\.embed_tokens\.weight"):
        require_whole(folder)
    tensors(lambda t: t.update({"model.embed_tokens.weight": t.pop("lm_head.weight")}))(folder)
    tensors(lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)])(folder)
    with pytest.raises(IncompleteModel, match=r"without the prefix 'model'"):
        require_whole(folder)


def test_fields_that_an_engine_overrides_count(folder: Path) -> None:
    with pytest.raises(IncompleteModel, match="no place for 9 tensors"):
        require_whole(folder, {"num_hidden_layers": 2})
    require_whole(folder, {"rms_norm_eps": 1e-3})


@pytest.mark.parametrize(("arch", "options"), [
    ("gpt_neox", {}), ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}), ("apertus", {"num_key_value_heads": 2}),
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}),
])  # fmt: skip
def test_renamed_and_merged_tensors_are_whole(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = transformers.AutoConfig.for_model(arch, vocab_size=64, **{**({} if arch == "gpt2" else shape), **options})
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    require_whole(tmp_path)
    names = sorted(load_file(tmp_path / FILE))
    for name in (names[0], names[-1]):
        shutil.copytree(tmp_path, tmp_path / name)
        tensors(lambda t, name=name: t.pop(name))(tmp_path / name)
        with pytest.raises(IncompleteModel):
            require_whole(tmp_path / name)


def test_a_model_that_is_not_here_is_somebody_elses_business(tmp_path: Path) -> None:
    require_whole("no-such-organisation-of-thaws/model")
    require_whole(tmp_path)
    with pytest.raises(NotFound):
        load_engine("transformers", model=str(tmp_path))


@pytest.mark.parametrize("name", LACKING)
def test_a_refusal_says_nothing_in_the_log(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not what transformers reports of the load, for the error has it."""
    LACKING[name][0](folder)
    for ask in (require_whole, lambda folder: load_engine("transformers", model=str(folder))):
        with caplog.at_level(logging.DEBUG), pytest.raises(IncompleteModel):
            ask(folder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_weights_that_run_in_place_of_others_are_of_the_same_model(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    require_weights_of(model, tiny_model("llama", seed=1))
    with pytest.raises(InvalidRequest, match=r"another model \(.*head_dim"):
        require_weights_of(model, tiny_model("llama", head_dim=64))
    with pytest.raises(NotFound, match=r"no config\.json"):
        require_weights_of(model, tmp_path)
    with load_engine("transformers", model=str(model)) as engine:
        before = engine.identity()
        with pytest.raises(InvalidRequest, match=r"another model \(.*head_dim"):
            engine.update_weights(str(tiny_model("llama", head_dim=64)))
        assert engine.identity() == before
        engine.update_weights(str(tiny_model("llama", seed=1)))
        assert engine.identity().weights != before.weights
        engine.update_weights(str(model))
        assert engine.identity() == before
