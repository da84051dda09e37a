"""Changes to a model's folder, and continuations to compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import thaw
from thaw import Sampling
from thaw.core.errors import IdentityMismatch
from thaw.core.ids import digest
from thaw.engines.base import Engine
from thaw.engines.hf import stored
from thaw.engines.hf.stored import StoredTensor
from thaw.repo import Repository
from thaw.store import Store
from thaw.weights import WeightsBook

FILE = "model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"
TEXT = "The store keeps what a session needs. "
GREEDY = Sampling(max_tokens=8, temperature=0.0, logprobs=5, ignore_eos=True)


def tensors(folder: Path, file: str = FILE) -> dict[str, torch.Tensor]:
    with safe_open(folder / file, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The folder, with its tensors changed."""
    found = tensors(folder)
    change(found)
    save_file(found, folder / FILE, metadata={"format": "pt"})
    return folder


def nudged(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[name] = found[name] + 0.5

    return change


def said(completion: Any) -> tuple[Any, Any]:
    return tuple(completion.token_ids), completion.logprobs


def commit_text(path: Path, model: Path | str, **how: Any) -> tuple[Any, Any]:
    """Reads a text, commits it to main and goes on; what was said."""
    with going_on(path, model) as repo, repo.session(seed=1) as session:
        session.append(TEXT * 4)
        session.commit("read", branch="main", **how)
        return said(session.generate("Go on. ", GREEDY))


@contextmanager
def going_on(path: Path, model: Path | str) -> Iterator[Repository]:
    """The repository with an engine of this model."""
    with thaw.load_engine("transformers", model=str(model)) as engine, thaw.open(path, engine=engine) as repo:
        yield repo


def forked(repo: Repository) -> tuple[Any, Any]:
    """What a fork of main says."""
    with repo.fork("main", 1, replay=True) as kids:
        return said(kids.generate("Go on. ", GREEDY)[0])


# --- what is wrong with a set


def flip(store: Store, blob: str) -> None:
    place = store.locate([blob])[blob]
    path = store.packs / place.pack
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(place.offset + place.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def forged(book: WeightsBook, change: Callable[[dict[str, StoredTensor]], Any]) -> Path:
    """The folder of a set whose manifest was changed, and everything that is hashed over it as well, so that nothing
    but what it says is wrong: as a set that was badly made."""
    folder = book.model("base")
    manifest = book.show("base").manifest
    changed = dict(manifest.tensors)
    change(changed)
    bad = msgspec.structs.replace(manifest, tensors=changed, leaves={})
    data = stored.encode(bad)
    (folder / stored.MANIFEST).write_bytes(data)
    at = msgspec.structs.replace(stored.place_of(folder), manifest=digest(data))
    (folder / stored.PLACE).write_bytes(msgspec.json.encode(at))
    return folder


def _without(found: dict[str, StoredTensor]) -> None:
    del found[LAYER]


def _reshaped(found: dict[str, StoredTensor]) -> None:
    rows, columns = found[LAYER].shape
    found[LAYER] = msgspec.structs.replace(found[LAYER], shape=(columns, rows))


def _integers(found: dict[str, StoredTensor]) -> None:
    found[LAYER] = msgspec.structs.replace(found[LAYER], dtype="I32")


def _half(found: dict[str, StoredTensor]) -> None:
    found[LAYER] = msgspec.structs.replace(found[LAYER], shape=(found[LAYER].shape[0] // 2, found[LAYER].shape[1]))


def _extra(found: dict[str, StoredTensor]) -> None:
    found["model.layers.9.extra"] = found[LAYER]


CHANGES = {
    "missing": (_without, rf"1 tensor is missing \({LAYER}\)"),
    "shape": (_reshaped, rf"{LAYER} has the shape \[64, 160\]"),
    "dtype": (_integers, rf"{LAYER} in I32"),
    "shard": (_half, rf"{LAYER} has the shape \[80, 64\]"),
    "extra": (_extra, r"no place for 1 tensor \(model\.layers\.9\.extra\)"),
}


def goes_on_without_the_models_files(boot: Callable[[Path], Engine], model: Path, tmp_path: Path) -> None:
    """The law of every engine that loads from packs: a repository alone gives the bits that the model's folder gave.

    And the negative control: with one tensor swapped, the commit is refused and logprobs differ.
    """
    folder = Path(shutil.copytree(model, tmp_path / "base"))
    with boot(folder) as engine, thaw.open(tmp_path / "repo", engine=engine) as repo, repo.session(seed=1) as session:
        session.append(TEXT * 4)
        session.commit("read", branch="main", with_weights=True)
        expected = said(session.generate("Go on. ", GREEDY))
        repo.weights.add(rewrite(folder, nudged(LAYER)), "tuned")
        models = [repo.weights.model(name) for name in ("base", "tuned")]
    shutil.rmtree(folder)
    with boot(models[0]) as engine, thaw.open(tmp_path / "repo", engine=engine) as repo, repo.fork("main", 1) as kids:
        assert said(kids.generate("Go on. ", GREEDY)[0]) == expected
    with boot(models[1]) as engine, thaw.open(tmp_path / "repo", engine=engine) as repo:
        with pytest.raises(IdentityMismatch, match="weights"):
            repo.fork("main", 1)
        with repo.session("main", policy="recompute") as session:
            assert said(session.generate("Go on. ", GREEDY))[1] != expected[1]
