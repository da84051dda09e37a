"""Weights in the store: what a set costs, what keeps it, and that what loads from packs is the model itself."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from weights_models import (
    CHANGES,
    FILE,
    GREEDY,
    LAYER,
    commit_text,
    flip,
    forged,
    forked,
    going_on,
    nudged,
    rewrite,
    said,
    tensors,
)

import thaw
from thaw import aio
from thaw.core.errors import (
    Busy,
    Conflict,
    CorruptBlob,
    IdentityMismatch,
    IncompleteModel,
    InvalidRequest,
    NewerFormat,
    NotFound,
    Unsupported,
)
from thaw.core.identity import tensor_leaf
from thaw.core.ids import digest
from thaw.engines.hf import stored
from thaw.engines.hf.stored import StoredTensor, WeightsManifest
from thaw.engines.hf.weights import root_of_folder
from thaw.repo import Repository
from thaw.repo.choice import choose
from thaw.repo.settings import remember
from thaw.store import Store, fsck
from thaw.weights import WeightsBook, record
from thaw.weights.tensors import of_folder, stream

Make = Callable[..., Path]


def packed(store: Store) -> int:
    return sum(path.stat().st_size for path in store.packs.iterdir())


# --- what a set is


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt_neox"])
def test_a_sets_id_is_the_weights_id_that_engines_give(book: WeightsBook, own_model: Make, arch: str) -> None:
    folder = own_model(arch=arch)
    added = book.add(folder)
    assert added.entry.weights == root_of_folder(folder, "float32")
    renamed = arch == "gpt_neox"  # whose head the files call otherwise: the id is of the loaded model then
    assert bool(book.show("base").manifest.leaves) is not renamed and added.is_new


def test_a_leaf_made_of_a_hash_is_the_leaf_made_of_bytes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        made = torch.arange(6).reshape(2, 3).to(dtype)
        data = bytes(made.reshape(-1).view(torch.uint8).numpy())
        word = next(word for word, name in stored.TORCH.items() if name == str(dtype).removeprefix("torch."))
        by_hash = stored.leaf("a.b", StoredTensor(digest(data), word, (2, 3)))
        assert by_hash == tensor_leaf("a.b", str(dtype).removeprefix("torch."), (2, 3), data)
    assert stored.leaf("a", StoredTensor(None, "F32", (0,))) == tensor_leaf("a", "float32", (0,), b"")


def test_one_changed_tensor_is_another_weights_id(book: WeightsBook, own_model: Make) -> None:
    one = book.add(own_model("one"))
    other = book.add(rewrite(own_model("other"), nudged(LAYER)))
    assert one.entry.weights != other.entry.weights
    assert other.num_written == 1


def test_a_fine_tune_costs_its_changed_tensors(store: Store, book: WeightsBook, own_model: Make) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64, "num_attention_heads": 8}
    book.add(own_model("base", **shape))
    before = packed(store)
    tuned = rewrite(own_model("tuned", **shape), lambda found: (nudged(LAYER)(found), nudged("lm_head.weight")(found)))
    added = book.add(tuned)
    changed = sum(tensors(tuned)[name].nbytes for name in (LAYER, "lm_head.weight"))
    assert added.nbytes_written == changed
    assert packed(store) - before <= 1.01 * changed
    assert book.show("tuned").shared_nbytes == book.show("tuned").entry.nbytes - changed


def test_tied_tensors_lie_once(store: Store, book: WeightsBook, own_model: Make) -> None:
    def both(found: dict[str, torch.Tensor]) -> None:
        found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()

    folder = own_model(tie_word_embeddings=True)
    once = book.add(folder, "once").entry
    twice = book.add(rewrite(folder, both), "twice")
    assert twice.num_written == 0 and twice.entry.nbytes == once.nbytes
    assert twice.entry.weights == once.weights
    assert twice.entry.num_tensors == once.num_tensors + 1


def test_a_set_that_is_here_is_not_written_again(store: Store, book: WeightsBook, own_model: Make) -> None:
    folder = own_model()
    book.add(folder)
    before = packed(store)
    again = book.add(folder)
    assert not again.is_new and packed(store) == before
    under_another_name = book.add(folder, "other")
    assert under_another_name.is_new and under_another_name.num_written == 0


def test_a_name_means_one_set(book: WeightsBook, own_model: Make) -> None:
    folder = own_model()
    book.add(folder)
    with pytest.raises(Conflict, match=r"'base' is here already.*thaw weights rm base"):
        book.add(rewrite(folder, nudged(LAYER)))
    assert [one.name for one in book.list()] == ["base"]
    assert book.add(folder, "tuned").is_new


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "-x", "a..b", "x" * 101, "ä"])
def test_a_name_that_cannot_be_one_is_refused(book: WeightsBook, own_model: Make, name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot name a weights set"):
        book.add(own_model(), name)
    assert book.list() == []


def test_dtypes_and_shapes_that_packs_do_not_know_come_back_as_they_were(store: Store, tmp_path: Path) -> None:
    odd = {
        "i64": torch.arange(5), "bool": torch.tensor([True, False]), "f64": torch.ones(2, 3, dtype=torch.float64),
        "f8": torch.ones(4).to(torch.float8_e4m3fn), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3),
        "bf16": torch.ones(1, 2, 1, 2, 1, dtype=torch.bfloat16), "twin": torch.arange(5),
    }  # fmt: skip
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(odd, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    book = WeightsBook(store)
    book.add(folder)
    manifest = book.show("adapter").manifest
    back = dict(stream(record.view(store), manifest))
    assert back.keys() == odd.keys()
    for name, tensor in odd.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert bytes(back[name].reshape(-1).view(torch.uint8).numpy()) == bytes(
            tensor.reshape(-1).view(torch.uint8).numpy()
        )
    book.checkout("adapter", tmp_path / "out")
    again = tensors(tmp_path / "out", "adapter_model.safetensors")
    assert all(torch.equal(again[n].to(torch.float64), t.to(torch.float64)) for n, t in odd.items())


def test_pickled_weights_are_refused_by_name(book: WeightsBook, own_model: Make) -> None:
    folder = own_model()
    torch.save(tensors(folder), folder / "pytorch_model.bin")
    (folder / FILE).unlink()
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin is not a safetensors file"):
        book.add(folder)


def test_code_beside_a_model_is_named_by_its_hash(book: WeightsBook, own_model: Make) -> None:
    folder = own_model()
    (folder / "modeling_own.py").write_text("x = 1\n")
    book.add(folder)
    assert book.show("base").manifest.code == {"modeling_own.py": digest(b"x = 1\n")}


# --- adapters


def adapter(folder: Path, rank: int = 2) -> Path:
    folder.mkdir()
    a = {f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_A.weight": torch.ones(rank, 64) for n in range(2)}
    save_file(a, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4}))
    return folder


def test_an_adapter_costs_itself(store: Store, book: WeightsBook, own_model: Make, tmp_path: Path) -> None:
    base = book.add(own_model()).entry
    before = packed(store)
    added = book.add(adapter(tmp_path / "lora", rank=256), base="base")
    nbytes = 256 * 64 * 4  # the two layers hold the same numbers here, so one blob
    assert added.entry.kind == "adapter" and added.nbytes_written == nbytes == added.entry.nbytes
    assert packed(store) - before <= nbytes + 24_000  # objects, the manifest and headers
    assert book.show("lora").manifest.base == base.weights


def test_an_adapters_id_is_of_its_tensors_and_its_config(book: WeightsBook, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora")
    one = book.add(folder, "one").entry
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
    other = book.add(folder, "other").entry
    assert one.weights != other.weights and one.architecture == "LORA"


def test_an_adapter_is_no_model_to_run(book: WeightsBook, tmp_path: Path) -> None:
    book.add(adapter(tmp_path / "lora"))
    with pytest.raises(InvalidRequest, match="is an adapter"):
        book.model("lora")


# --- what keeps it


def test_gc_keeps_a_set_and_frees_one_that_was_removed(store: Store, book: WeightsBook, own_model: Make) -> None:
    base, tuned = own_model("base"), rewrite(own_model("tuned"), nudged(LAYER))
    book.add(base)
    book.add(tuned)
    assert store.gc(keep_reflog_s=0).blobs_removed == 0
    book.rm("tuned")
    report = store.gc(keep_reflog_s=0)
    manifest = 1
    assert report.blobs_removed == 1 + manifest  # the tensor that base has not; all small files are base's too
    assert store.fsck().ok
    assert len(dict(of_folder(book.model("base")))) == len(tensors(base))


def test_rm_refuses_while_a_commit_names_the_weights(repo: Repository, own_model: Make, tmp_path: Path) -> None:
    folder = own_model()
    repo.weights.add(folder)
    commit_text(repo.path, folder)
    commit = repo.resolve("main").commit
    with pytest.raises(Busy, match=rf"commit {commit[3:13]} was captured from the weights 'base'.*--force"):
        repo.weights.rm("base")
    assert repo.weights.show("base").num_commits == 1
    repo.weights.add(folder, "second")
    repo.weights.rm("base")  # another set has the same weights
    with pytest.raises(Busy):
        repo.weights.rm("second")
    repo.delete_branch("main")
    repo.gc(keep_reflog_s=0)
    repo.weights.rm("second")
    assert repo.weights.list() == []


def test_rm_counts_the_commits_of_other_namespaces_and_does_not_name_them(
    repo: Repository, own_model: Make, tmp_path: Path
) -> None:
    folder = own_model()
    repo.weights.add(folder)
    with (
        thaw.load_engine("transformers", model=str(folder)) as engine,
        thaw.open(repo.path, engine=engine, namespace="acme") as theirs,
        theirs.session() as session,
    ):
        session.append("text")
        commit = session.commit("read", branch="main").commit
    with pytest.raises(Busy, match="a commit of another namespace") as refused:
        repo.weights.rm("base")
    assert commit[3:13] not in str(refused.value)
    repo.weights.rm("base", force=True)


def test_an_interrupted_add_leaves_nothing(
    store: Store, book: WeightsBook, own_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = own_model(), {}
    found["packs"] = sorted(path.name for path in store.packs.iterdir())
    monkeypatch.setattr("thaw.weights.record.put", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        book.add(folder)
    assert book.list() == [] and sorted(path.name for path in store.packs.iterdir()) == found["packs"]


def _interrupted(*_: object) -> Any:
    raise KeyboardInterrupt


def test_a_database_that_was_lost_is_rebuilt_with_its_weights(store: Store, book: WeightsBook, own_model: Make) -> None:
    weights = book.add(own_model()).entry.weights
    store.close()
    (store.path / "thaw.db").unlink()
    assert fsck(store.path, rebuild=True).ok
    with Store.open(store.path) as again:
        assert [one.weights for one in WeightsBook(again).list()] == [weights]
        assert again.fsck().ok


# --- what loads from packs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_without_the_models_files_goes_on_bitwise(tmp_path: Path, own_model: Make, dtype: str) -> None:
    folder = own_model(dtype=dtype, tie_word_embeddings=dtype == "bfloat16")
    expected = commit_text(tmp_path / "repo", folder, with_weights=True)
    shutil.copytree(tmp_path / "repo", tmp_path / "elsewhere" / "repo")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "repo")
    with thaw.open(tmp_path / "elsewhere" / "repo", create=False) as look:
        model = look.weights.model("base")
    with going_on(tmp_path / "elsewhere" / "repo", model) as repo:
        assert forked(repo) == expected
        assert len({repo.store.get(one).weights for one in repo.store.models()}) == 1  # type: ignore[union-attr]


def test_loading_asks_for_no_weight_file(book: WeightsBook, own_model: Make) -> None:
    book.add(own_model())
    model = book.model("base")
    assert not [path for path in model.rglob("*") if path.suffix in (".safetensors", ".bin")]
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) < 100_000


def test_another_tensor_says_other_things(tmp_path: Path, own_model: Make) -> None:
    """The negative control of the law above: with one tensor swapped, commits refuse, and logprobs differ."""
    base = own_model("base")
    expected = commit_text(tmp_path / "repo", base, with_weights=True)
    with thaw.open(tmp_path / "repo", create=False) as look:
        look.weights.add(rewrite(own_model("tuned"), nudged(LAYER)))
        model = look.weights.model("tuned")
    with going_on(tmp_path / "repo", model) as repo:
        with pytest.raises(IdentityMismatch, match="weights"):
            repo.fork("main", 1)
        with repo.session("main", policy="recompute") as session:
            assert said(session.generate("Go on. ", GREEDY))[1] != expected[1]


def test_a_repository_remembers_a_stored_model_by_its_name(tmp_path: Path, own_model: Make) -> None:
    commit_text(tmp_path / "repo", own_model(), with_weights=True)
    with thaw.open(tmp_path / "repo", create=False) as look:
        chosen = choose(look.store, None, "thaw:base")
        assert chosen.options["model"] == str(look.path.resolve() / "models" / "base")
        remember(look.store, chosen)
        assert look.store.get_setting("engine") == '{"name":"transformers","options":{"model":"thaw:base"}}'
    shutil.move(tmp_path / "repo", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "models")
    with thaw.open(tmp_path / "moved", create=False) as look:
        model = choose(look.store, None, None).options["model"]
        assert model == str((tmp_path / "moved" / "models" / "base").resolve()) and Path(str(model)).is_dir()
        with pytest.raises(NotFound, match=r"no weights set 'gone'.*there are: base"):
            choose(look.store, None, "thaw:gone")
        with pytest.raises(InvalidRequest, match="names a model in a repository"):
            choose(None, None, "thaw:base")


def test_a_commit_with_weights_needs_files_that_are_what_runs(tmp_path: Path, own_model: Make) -> None:
    folder = own_model()
    with (
        thaw.load_engine("transformers", model=str(folder)) as engine,
        thaw.open(tmp_path / "r", engine=engine) as repo,
    ):
        engine.identity()
        rewrite(folder, nudged(LAYER))
        with repo.session() as session:
            session.append("text")
            with pytest.raises(IdentityMismatch, match="Nothing was committed"):
                session.commit("read", branch="main", with_weights=True)
            assert repo.branches() == [] and repo.weights.list() == []


def test_weights_are_awaited(tmp_path: Path, own_model: Make) -> None:
    async def main() -> None:
        async with await aio.open(tmp_path / "r", create=True) as repo:
            added = await repo.weights.add(own_model())
            assert [one.weights for one in await repo.weights.list()] == [added.entry.weights]
            assert (await repo.weights.rm("base")).name == "base"

    asyncio.run(main())


# --- what is wrong is named


def test_a_flipped_byte_in_a_pack_names_tensor_pack_and_blob(store: Store, book: WeightsBook, own_model: Make) -> None:
    book.add(own_model())
    model = book.model("base")
    blob = book.show("base").manifest.tensors[LAYER].blob
    assert blob is not None
    flip(store, blob)
    with pytest.raises(CorruptBlob, match=rf"tensor {LAYER}: pack .*{blob}"):
        thaw.load_engine("transformers", model=str(model))


@pytest.mark.parametrize("what", CHANGES)
def test_a_set_that_is_not_its_config_is_named(store: Store, book: WeightsBook, own_model: Make, what: str) -> None:
    change, words = CHANGES[what]
    book.add(own_model())
    with pytest.raises(IncompleteModel, match=words):
        thaw.load_engine("transformers", model=str(forged(book, change)))


def test_a_manifest_that_was_changed_is_refused(store: Store, book: WeightsBook, own_model: Make) -> None:
    """Its tensors make its id, so one that is exchanged inside the set is found before a byte is read."""
    book.add(own_model())
    manifest = book.show("base").manifest
    names = [name for name in manifest.tensors if "up_proj" in name]
    swapped = {**manifest.tensors, names[0]: manifest.tensors[names[1]], names[1]: manifest.tensors[names[0]]}
    with pytest.raises(CorruptBlob, match="its tensors have the weights id"):
        stored.encode(msgspec.structs.replace(manifest, tensors=swapped))
    path = book.model("base") / stored.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"float32"', b'"float16"'))
    with pytest.raises(IncompleteModel, match=r"hashes to b3:.*--model thaw:NAME"):
        stored.manifest_of(path.parent)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"type":"thaw.weights/1"}', '{"type":"thaw.weights/1","kind":"model"', "\xff"]
)
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(CorruptBlob, match="the text cannot be read"):
        stored.decode(text.encode("latin-1"), "the text")


def test_a_newer_manifest_says_so() -> None:
    with pytest.raises(NewerFormat):
        stored.decode(b'{"type":"thaw.weights/2"}', "the text")


@pytest.mark.parametrize("name", ["../x", "a/../b", "/etc/passwd", ".", "a/b/c", "a\\b", ""])
def test_a_manifest_leads_to_no_other_folder(name: str) -> None:
    made = WeightsManifest(kind="model", weights="b3:" + "0" * 64, dtype="float32", architecture="X", tensors={})
    with pytest.raises(CorruptBlob):
        stored.encode(msgspec.structs.replace(made, code={name: "b3:" + "0" * 64}))


def test_a_set_that_was_removed_under_its_folder_is_named(store: Store, book: WeightsBook, own_model: Make) -> None:
    book.add(own_model())
    kept = shutil.copytree(book.model("base"), store.path / "models" / "kept")
    book.rm("base")
    store.gc(keep_reflog_s=0)
    with pytest.raises(IncompleteModel, match="was removed from"):
        list(of_folder(Path(kept)))


def test_the_dtype_of_a_set_is_the_one_that_it_was_added_with(book: WeightsBook, own_model: Make) -> None:
    folder = own_model()
    half = book.add(folder, "half", dtype="bfloat16").entry
    whole = book.add(folder, "whole").entry
    assert half.weights == root_of_folder(folder, "bfloat16") != whole.weights
    assert root_of_folder(book.model("half"), "bfloat16") == half.weights
    with pytest.raises(IncompleteModel, match=r"runs in bfloat16; this engine runs float32.*--dtype float32"):
        root_of_folder(book.model("half"), "float32")


def test_checkout_gives_the_same_model_back(book: WeightsBook, own_model: Make, tmp_path: Path) -> None:
    folder = own_model()
    book.add(folder)
    assert book.checkout("base", tmp_path / "out") == sum(one.nbytes for one in tensors(folder).values())
    assert root_of_folder(tmp_path / "out", "float32") == book.list()[0].weights
    assert all(torch.equal(one, tensors(folder)[name]) for name, one in tensors(tmp_path / "out").items())
    with pytest.raises(Conflict, match="is not empty"):
        book.checkout("base", tmp_path / "out")


# --- linked sets


def test_a_linked_set_copies_no_tensor_and_is_verified(tmp_path: Path, own_model: Make) -> None:
    folder = own_model()
    expected = commit_text(tmp_path / "repo", folder)
    with thaw.open(tmp_path / "repo", create=False) as repo:
        added = repo.weights.add(folder, link=True)
        assert added.num_written == 0 and added.entry.link == str(folder.resolve())
        assert repo.gc(keep_reflog_s=0).blobs_removed == 0 and repo.fsck().ok
        model = repo.weights.model("base")
    with going_on(tmp_path / "repo", model) as repo:
        assert forked(repo) == expected
        with pytest.raises(Unsupported, match="without --link"):
            repo.add_remote("origin", f"file://{tmp_path / 'remote'}")
            repo.push("main", weights=True)
        repo.weights.checkout("base", tmp_path / "out")
    rewrite(folder, nudged(LAYER))
    with pytest.raises(CorruptBlob, match=rf"tensor {LAYER}: "):
        thaw.load_engine("transformers", model=str(model))
    rewrite(folder, lambda found: found.pop(LAYER))
    with pytest.raises(IncompleteModel, match=rf"tensor {LAYER} .*is not there"):
        thaw.load_engine("transformers", model=str(model))
    shutil.rmtree(folder)
    with pytest.raises(IncompleteModel, match="is not there any more: bring the folder back"):
        thaw.load_engine("transformers", model=str(model))


def test_a_linked_set_is_copied_when_it_is_added_without(store: Store, book: WeightsBook, own_model: Make) -> None:
    folder = own_model()
    linked = book.add(folder, link=True).entry
    copied = book.add(folder)
    assert copied.is_new and copied.nbytes_written == linked.nbytes and copied.entry.link is None
    assert not book.add(folder, link=True).is_new  # what was copied stays so
    shutil.rmtree(folder)
    assert dict(of_folder(book.model("base")))


def test_a_running_engine_takes_the_weights_of_a_set(tmp_path: Path, own_model: Make) -> None:
    base, tuned = own_model(), rewrite(own_model("tuned"), nudged(LAYER))
    with thaw.load_engine("transformers", model=str(base)) as engine, thaw.open(tmp_path / "r", engine=engine) as repo:
        weights = repo.weights.add(tuned).entry.weights
        assert engine.identity().weights != weights
        engine.update_weights(str(repo.weights.model("tuned")))
        assert engine.identity().weights == weights


def test_a_folder_of_the_users_own_is_left_alone(store: Store, book: WeightsBook, own_model: Make) -> None:
    mine = store.path / "models" / "base"
    shutil.copytree(own_model("elsewhere"), mine)
    before = sorted(path.name for path in mine.iterdir())
    assert choose(store, None, str(mine)).options["model"] == str(mine)
    book.add(mine)
    with pytest.raises(Conflict, match="was not made by thaw"):
        book.model("base")
    book.rm("base")
    assert sorted(path.name for path in mine.iterdir()) == before
