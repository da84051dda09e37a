"""Weights from packs, verified, against loaders that read safetensors files and verify nothing.

    python benchmarks/weights_load.py FOLDER [--gigabytes 2] [--rounds 5] [--device cpu|cuda] [--out receipt.json]

Makes a model of random weights (bfloat16, the shapes of a Llama) in FOLDER, in files of about 4 GB, and adds it to a
repository there. Then each arm brings every tensor into parameters that are allocated before, as an engine does, from
files that the kernel was told to forget (`posix_fadvise`, file by file). Arms alternate, in another order each round:

    thaw            `thaw.weights.tensors.stream`: from packs, each tensor hashed (BLAKE3) on the host before it is used
    pageable        the same through memory that is not page-locked (on a GPU)
    safetensors     `safe_open` and `get_tensor`, one tensor after the other: what transformers and vLLM do by default
    threads         the same on 8 threads, as SGLang does by default
    fastsafetensors `ParallelLoader`, where it is installed (without GPUDirect storage, on a CPU as well)
    runai           Run:ai Model Streamer, where it is installed
    read            nothing but reads of 8 MiB on 8 threads into memory that is used again: what the disk gives

The receipt has the ratio of each loader's seconds to thaw's, over paired rounds. No network is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from thaw import receipt as r
from thaw.data.files import drop_cache
from thaw.receipt.machine import software, this_machine
from thaw.store import Store
from thaw.weights import WeightsBook, record
from thaw.weights.tensors import stream

HIDDEN, INTER, VOCAB, HEADS = 4096, 14336, 32_000, 32
SHARD_BYTES = 4_000_000_000
THREADS, READ = 8, 8 << 20
TITLES = {
    "thaw": "from packs, every tensor verified",
    "pageable": "the same, by memory that is not page-locked",
    "safetensors": "safetensors, one tensor after the other",
    "threads": "safetensors on 8 threads",
    "fastsafetensors": "fastsafetensors",
    "runai": "Run:ai Model Streamer",
    "read": "reading the files, and nothing else",
}
Params = dict[str, torch.Tensor]


def make_model(folder: Path, nbytes: int) -> list[Path]:
    """A model's folder of about that many bytes; its weight files."""
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTER, HIDDEN), "mlp.up_proj": (INTER, HIDDEN), "mlp.down_proj": (HIDDEN, INTER),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    each = 2 * sum(rows * (rest[0] if rest else 1) for rows, *rest in layer.values())
    num = max(1, round((nbytes - 4 * VOCAB * HIDDEN) / each))
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(num) for name, shape in layer.items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": INTER, "num_hidden_layers": num, "num_attention_heads": HEADS, "vocab_size": VOCAB,
        "num_key_value_heads": HEADS // 4, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return _write(folder, {f"{name}.weight": shape for name, shape in shapes.items()})


def _write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> list[Path]:
    """Each tensor is its own multiple of the same random numbers, so no two are one blob."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and held + nbytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += nbytes
    drawn = torch.randn(max(torch.Size(shape).numel() for shape in shapes.values())).to(torch.bfloat16)
    where, paths = {}, []
    for number, some in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        made = {
            n: drawn[: torch.Size(s).numel()].reshape(s) * (1 + len(where) + i) for i, (n, s) in enumerate(some.items())
        }
        save_file(made, path, metadata={"format": "pt"})
        where |= dict.fromkeys(some, path.name)
        paths.append(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return paths


# --- arms


def with_thaw(store: Store, manifest: Any, params: Params, pinned: bool | None = None) -> None:
    for name, tensor in stream(store, manifest, pinned=pinned):
        params[name].copy_(tensor)


def with_safetensors(paths: list[Path], params: Params) -> None:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                params[name].copy_(file.get_tensor(name))


def with_threads(paths: list[Path], params: Params) -> None:
    def one(some: tuple[Path, list[str]]) -> None:
        with safe_open(some[0], framework="pt") as file:
            for name in some[1]:
                params[name].copy_(file.get_tensor(name))

    parts = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        parts += [(path, names[at::THREADS]) for at in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, parts))


def with_fastsafetensors(paths: list[Path], params: Params) -> None:
    from fastsafetensors import SingleGroup
    from fastsafetensors.parallel_loader import ParallelLoader

    device = str(next(iter(params.values())).device)
    loader = ParallelLoader(
        pg=SingleGroup(), hf_weights_files=[str(path) for path in paths], queue_size=0, use_tqdm_on_load=False,
        device=device, nogds=True,
    )  # fmt: skip
    try:
        for name, tensor in loader.iterate_weights():
            params[name].copy_(tensor)
    finally:
        loader.close()


def with_runai(paths: list[Path], params: Params) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in paths])
        for name, tensor in streamer.get_tensors():
            params[name].copy_(tensor)


def with_read(paths: list[Path]) -> None:
    def one(part: tuple[Path, int]) -> None:
        path, at = part
        scratch = bytearray(READ)
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            for offset in range(at * READ, size, THREADS * READ):
                os.preadv(fd, [scratch], offset)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(THREADS) as pool:
        for path in paths:
            list(pool.map(one, [(path, at) for at in range(THREADS)]))


def arms(store: Store, manifest: Any, paths: list[Path], params: Params) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {
        "thaw": lambda: with_thaw(store, manifest, params),
        "safetensors": lambda: with_safetensors(paths, params),
        "threads": lambda: with_threads(paths, params),
        "read": lambda: with_read(paths),
    }
    if next(iter(params.values())).is_cuda:
        found["pageable"] = lambda: with_thaw(store, manifest, params, pinned=False)
    if importlib.util.find_spec("fastsafetensors") is not None:
        found["fastsafetensors"] = lambda: with_fastsafetensors(paths, params)
    if importlib.util.find_spec("runai_model_streamer") is not None:
        found["runai"] = lambda: with_runai(paths, params)
    return found


# --- rounds


def cold(store: Store, paths: list[Path]) -> None:
    for path in (*paths, *store.packs.iterdir()):
        drop_cache(path)


def rounds(
    store: Store, paths: list[Path], run: dict[str, Callable[[], None]], params: Params, num: int
) -> Iterator[tuple[int, str, float, str]]:
    """(round, arm, seconds, digest of what the parameters hold)."""
    order = list(run)
    for number in range(num):
        random.Random(number).shuffle(order)
        for arm in list(order):
            for tensor in params.values():
                tensor.zero_()
            cold(store, paths)
            _wait(params)
            began = time.perf_counter()
            try:
                run[arm]()
            except (ImportError, RuntimeError, OSError, ValueError) as error:
                print(f"{arm} does not run here and is left out: {error!r}", flush=True)
                order.remove(arm)
                continue
            _wait(params)
            yield number, arm, time.perf_counter() - began, _digest(params) if arm != "read" else ""


def _wait(params: Params) -> None:
    if next(iter(params.values())).is_cuda:
        torch.cuda.synchronize()


def _digest(params: Params) -> str:
    from thaw.core.ids import digest

    sums = [float(params[name].float().sum()) for name in sorted(params)]
    return digest(json.dumps(sums).encode())


def receipt(told: argparse.Namespace, found: dict[str, dict[int, tuple[float, str]]], nbytes: int) -> r.Receipt:
    made = []
    for arm, by_round in found.items():
        rows = [
            r.Round(
                pair=number, values={"load_s": seconds, "gb_per_s": nbytes / seconds / 1e9},
                outputs={"weights": said} if said else {},
            )
            for number, (seconds, said) in sorted(by_round.items())
        ]  # fmt: skip
        text = "from the first read to the last tensor in its place, cold files"
        made.append(r.Arm(name=arm, title=TITLES[arm], text=text, rounds=tuple(rows)))
    others = [arm for arm in found if arm not in ("thaw", "pageable", "read")]
    derived = [r.median(f"{arm}-gb-per-s", TITLES[arm], "GB/s", r.Term(arm=arm, value="gb_per_s")) for arm in found]
    derived += [
        r.ratio(f"{arm}-over-thaw", f"seconds of {arm} over those of thaw", r.Term(arm=arm, value="load_s"),
                r.Term(arm="thaw", value="load_s"))
        for arm in (*others, "read")
    ]  # fmt: skip
    checks = [
        r.equal_outputs(
            f"same-as-{arm}", f"what thaw loaded is what {arm} loaded", "thaw", arm, "weights", promised=True
        )
        for arm in others
    ]
    best = min(others, key=lambda arm: sorted(one[0] for one in found[arm].values())[len(found[arm]) // 2])
    accelerator = torch.cuda.get_device_name() if told.device.startswith("cuda") else None
    return r.make(
        kind="weights-load",
        command=f"python benchmarks/weights_load.py FOLDER --gigabytes {told.gigabytes} --rounds {told.rounds} "
        f"--device {told.device}",
        versions=software("torch", "safetensors", "fastsafetensors", "runai-model-streamer"),
        machine=this_machine(accelerator),
        model=None,
        parameters={"nbytes": nbytes, "device": told.device, "rounds": told.rounds},
        arms=made,
        derived=derived,
        checks=checks,
        goals=[r.at_least("best", f"≥ 0.95 × of the best loader, {best}", f"{best}-over-thaw", 0.95)],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="weights from packs against other loaders")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    folder = told.folder / "weights_load"
    try:
        paths = make_model(folder / "model", int(told.gigabytes * 1e9))
        with Store.init(folder / "repo") as store:
            book = WeightsBook(store)
            added = book.add(folder / "model", "bench")
            print(f"added {added.entry.nbytes / 1e9:.2f} GB in {added.seconds:.1f} s", flush=True)
            manifest = book.show("bench").manifest
            params = {
                name: torch.zeros(one.shape, dtype=torch.bfloat16, device=told.device)
                for name, one in manifest.tensors.items()
            }
            seen, found = record.view(store), dict[str, dict[int, tuple[float, str]]]()
            for number, arm, seconds, said in rounds(
                seen, paths, arms(seen, manifest, paths, params), params, told.rounds
            ):
                found.setdefault(arm, {})[number] = (seconds, said)
                print(f"{number} {arm:16} {seconds:7.2f} s {added.entry.nbytes / seconds / 1e9:6.2f} GB/s", flush=True)
        made = receipt(told, found, added.entry.nbytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if told.out is not None:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        told.out.write_bytes(r.dumps(made))
    for one in made.derived:
        print(f"{one.name:28} {one.value:.3f} {one.unit} [{one.low:.3f}, {one.high:.3f}]")
    print(f"same tensors: {all(check.held for check in made.checks)}; goal held: {all(g.held for g in made.goals)}")
    return 0 if made.ok else 1


if __name__ == "__main__":
    sys.exit(main())
