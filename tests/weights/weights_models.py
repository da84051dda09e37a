"""Changes to a model's folder, and continuations to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import thaw
from thaw import Sampling
from thaw.repo import Repository

FILE = "model.safetensors"
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
