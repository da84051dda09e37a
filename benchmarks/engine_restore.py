"""How long a whole engine takes to come back, beside its own cold boot and a plain read of the KV.

    python benchmarks/engine_restore.py FOLDER [--out RECEIPT] [--rounds 7] [--sessions 8] [--tokens 2000]
        [--engines transformers,vllm] [--vllm .venv-vllm/bin/python] [--model MODEL]

Once for each engine: sessions read a prompt each and generate, and a snapshot of all is taken. Then rounds of three
arms, in an order that turns, each from a new process, timed from its start:

    boot       import thaw, load the engine, open the repository
    restore    the same, then `thaw.snapshot.restore`: until all sessions are in the engine, their KV verified
    read       no engine: the snapshot's packs are read from the first byte to the last, by one thread

Before `restore` and `read` the packs are copied anew, synced and dropped from the page cache. The model's files stay in
it, for all arms alike. The limit is the boot of the same round and a read at nine tenths of the plain one's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

import thaw
from thaw import receipt as r
from thaw.bench.subject import model_of, numerics
from thaw.bench.told import tell
from thaw.demo.model import ensure_demo_model
from thaw.receipt.machine import software, this_machine
from thaw.snapshot import RequestQueue, restore, snapshot

NAME = "engine"
SHARE = 0.9
"""Of a plain read's speed, at which the KV may be loaded."""
PIECE_NBYTES = 8 << 20
TITLES = {
    "boot": ("cold boot", "From the process's start until the engine is there and the repository is open."),
    "restore": ("restore", "From the process's start until all sessions are back."),
    "read": ("plain read", "All packs of the snapshot, cold, by one thread."),
}
LONG: dict[str, Any] = {"temperature": 0.8, "max_tokens": 1000, "ignore_eos": True}
OPTIONS: dict[str, dict[str, Any]] = {"transformers": {}, "vllm": {"enforce_eager": True, "max_model_len": 4096}}


def load(name: str, model: str) -> Any:
    return thaw.load_engine(name, model=model, **OPTIONS[name])


# -- in processes of their own


def prepare(folder: Path, name: str, model: str, sessions: int, tokens: int) -> None:
    with load(name, model) as engine, thaw.open(folder / "made", engine=engine, create=True) as repo:
        queue = RequestQueue(repo)
        queue.hold()
        for i in range(sessions):
            session = repo.session(seed=i)
            session.append(token_ids=[100 + (7 * j * j + 13 * i + j) % 20_000 for j in range(tokens)])
            queue.submit(session, sampling=thaw.Sampling(**LONG), id=f"r{i}")
        queue.release()
        for one in queue.requests():
            next(iter(one.stream()))
        taken = snapshot(repo, NAME, queue=queue)
        queue.close()
        assert not taken.missed and len(taken.of("running")) == sessions
        said = {
            "num_kv": sum(one.num_kv for one in taken.sessions),
            "model": msgspec.to_builtins(model_of(engine)),
            "numerics": numerics(engine.info),
            "version": engine.info.version,
        }
    print(json.dumps(said), flush=True)


def boot(folder: Path, name: str, model: str) -> None:
    with load(name, model) as engine, thaw.open(folder / "copy", engine=engine, create=False):
        print(json.dumps({"ready": True}), flush=True)


def bring_back(folder: Path, name: str, model: str) -> None:
    with load(name, model) as engine, thaw.open(folder / "copy", engine=engine, create=False) as repo:
        back = restore(repo, NAME)
        print(json.dumps({"ready": True}), flush=True)
        proofs = [one.proof for one in back.sessions.values()]
        back.queue.close()
        assert not back.missed
        print(json.dumps({
            "hits": [[p.num_prompt_tokens, p.num_cached_tokens, p.num_recomputed_tokens] for p in proofs if p],
            "load_s": back.seconds,
        }), flush=True)  # fmt: skip


def read(folder: Path) -> float:
    """Seconds."""
    piece = bytearray(PIECE_NBYTES)
    began = time.perf_counter()
    for path in packs(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return time.perf_counter() - began


# -- the rounds


def packs(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "copy" / "packs").iterdir() if path.is_file())


def copy_cold(folder: Path) -> None:
    shutil.rmtree(folder / "copy", ignore_errors=True)
    shutil.copytree(folder / "made", folder / "copy")
    os.sync()
    for path in packs(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(words: Iterable[object], python: str) -> tuple[float, list[dict[str, Any]]]:
    """Seconds until its first line, and all that it says."""
    command = [python, __file__, "--child", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src"), "VLLM_LOGGING_LEVEL": "ERROR"}
    began = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        took = time.perf_counter() - began
        rest = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return took, [json.loads(line) for line in (first, *rest.splitlines()) if line.startswith("{")]


def one_round(folder: Path, name: str, model: str, python: str, order: Iterable[str]) -> dict[str, dict[str, Any]]:
    done: dict[str, dict[str, Any]] = {}
    for arm in order:
        copy_cold(folder)
        if arm == "read":
            done[arm] = {"seconds": read(folder)}
            continue
        seconds, said = child([arm, folder, name, model], python)
        done[arm] = {"seconds": seconds, **said[-1]}
    nbytes = sum(path.stat().st_size for path in packs(folder))
    done["restore"]["limit"] = done["boot"]["seconds"] + done["read"]["seconds"] / SHARE
    done["restore"]["nbytes"] = nbytes
    return done


def rounds_of(arm: str, rounds: list[dict[str, dict[str, Any]]], num_kv: int) -> tuple[r.Round, ...]:
    found = []
    for pair, done in enumerate(rounds):
        values, hits = {"seconds_s": float(done[arm]["seconds"])}, None
        if arm == "restore":
            values |= {
                "limit_s": done[arm]["limit"],
                "load_s": done[arm]["load_s"],
                "nbytes": float(done[arm]["nbytes"]),
            }
            prompt, cached, again = map(sum, zip(*done[arm]["hits"], strict=True))
            hits = r.Hits(
                num_prompt_tokens=prompt, num_wanted_tokens=num_kv, num_cached_tokens=cached, num_prefilled_tokens=again
            )
        found.append(r.Round(pair=pair, values=values, hits=hits))
    return tuple(found)


def seal(options: argparse.Namespace, found: dict[str, tuple[dict[str, Any], list[Any]]]) -> r.Receipt:
    derived, checks, goals, arms = [], [], [], []
    parameters: dict[str, Any] = {"sessions": options.sessions, "tokens": options.tokens, "rounds": options.rounds}
    for name, (told, rounds) in found.items():

        def term(arm: str, value: str = "seconds_s", name: str = name) -> r.Term:
            return r.Term(arm=f"{name}.{arm}", value=value)

        arms += [
            r.Arm(
                name=f"{name}.{arm}", title=f"{name}: {title}", text=text,
                rounds=rounds_of(arm, rounds, told["num_kv"]),
            )
            for arm, (title, text) in TITLES.items()
        ]  # fmt: skip
        derived += [r.median(f"{name}.{arm}.seconds", f"{name}: {TITLES[arm][0]}", "s", term(arm)) for arm in TITLES]
        derived += [
            r.median(f"{name}.load.seconds", f"{name}: the call of restore alone", "s", term("restore", "load_s")),
            r.ratio(
                f"{name}.share", f"{name}: restore takes × cold boot and a read at {SHARE:.0%} of that speed",
                term("restore"), term("restore", "limit_s"),
            ),
        ]  # fmt: skip
        checks.append(r.all_hit(f"{name}.hit", f"{name}: every token's KV was loaded", f"{name}.restore"))
        goals.append(r.at_most(f"{name}.limit", f"{name}: at most 1.05 × of that", f"{name}.share", 1.05))
        parameters |= {f"{name}.version": told["version"], f"{name}.num_kv": told["num_kv"]}
        parameters |= {f"{name}.{key}": value for key, value in told["numerics"].items()}
        parameters[f"{name}.dtype"] = told["model"]["dtype"]
    return r.make(
        kind="bench.engine-restore",
        command=(
            f"python benchmarks/engine_restore.py FOLDER --rounds {options.rounds} --sessions {options.sessions} "
            f"--tokens {options.tokens} --engines {','.join(found)}"
        ),
        versions=software("torch", "transformers", "blake3"),
        machine=this_machine(),
        model=msgspec.convert(next(iter(found.values()))[0]["model"], r.Model),
        parameters=parameters,
        arms=arms,
        derived=derived,
        checks=checks,
        goals=goals,
        notes=("The packs are cold, the model's files are in the page cache. Boots are of new processes.",),
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folder", type=Path)
    words.add_argument("--out", type=Path)
    words.add_argument("--model", help="default: the demo's")
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--sessions", type=int, default=8)
    words.add_argument("--tokens", type=int, default=2000)
    words.add_argument("--engines", default="transformers,vllm")
    words.add_argument("--vllm", default=".venv-vllm/bin/python", help="the Python that has vLLM")
    options = words.parse_args()
    model = options.model or str(ensure_demo_model(print))
    found = {}
    for name in options.engines.split(","):
        folder = options.folder / name
        folder.mkdir(parents=True)
        python = options.vllm if name == "vllm" else sys.executable
        _, (told,) = child(["prepare", folder, name, model, options.sessions, options.tokens], python)
        rounds = []
        for number in range(-1, options.rounds):  # one round before them, which is not counted
            order = list(TITLES)[number % 3 :] + list(TITLES)[: number % 3]
            done = one_round(folder, name, model, python, order)
            print(name, number, {arm: round(one["seconds"], 2) for arm, one in done.items()}, flush=True)
            if number >= 0:
                rounds.append(done)
        found[name] = told, rounds
        shutil.rmtree(folder)
    tell(seal(options, found), options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        verb, where, engine_name, of_model, *numbers = sys.argv[2:]
        {"prepare": prepare, "boot": boot, "restore": bring_back}[verb](
            Path(where), engine_name, of_model, *map(int, numbers)
        )  # type: ignore[operator]
    else:
        main()
