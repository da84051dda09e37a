"""First tokens of children of one prompt on vLLM, on a model with recurrent layers: thaw beside vLLM's prefix cache.

    python benchmarks/recurrent_points_vllm.py [MODEL] [--prefix 3500] [--suffix 200] [--children 16] [--rounds 5]

with thaw importable in vLLM's environment. Without a model, one of Qwen3-Next's architecture with random weights. A
prompt is read once, untimed, by every arm; then children come at once, each with a suffix of its own, and the time is
taken until all have their first token. Each round has a prompt that is new. Three places where the children begin:

    inside     after `prefix` tokens of a prompt that goes on for some more; thaw was asked to keep that point
    end        at the prompt's end
    boundary   at the prompt's end, where that is a boundary of vLLM's own blocks

Arms, each an engine of its own, alternating: thaw (the live session is forked), and vLLM without thaw with three
settings of its prefix cache: its defaults; all states kept (`prefix_cache_retention_interval=None`); the same, and
steps of one block (`max_num_batched_tokens`), for vLLM has states only where a step ends. Goals are against the best.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import thaw
from thaw import Sampling
from thaw import receipt as r
from thaw.bench.rounds import Rounds, arms_of
from thaw.bench.sample import Sample
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.told import tell
from thaw.bench.vllm.plain import Plain, PlainRequest, boot_stock
from thaw.core.ids import digest
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository

FIRST = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
MORE = 100
"""Tokens that the prompt continues with, where the children begin inside."""
PLACES = {"inside": "inside a prompt", "end": "at a prompt's end", "boundary": "at a boundary of vLLM's blocks"}
STOCK = ("default", "all", "steps")
SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 8, "linear_num_value_heads": 8,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "max_position_embeddings": 8192,
}  # fmt: skip
"""Of the random model: six layers of eight are recurrent."""
TITLES = {
    "thaw": ("thaw", "fork the live session, and all suffixes in one batch"),
    "default": ("vLLM, as it comes", "plain requests, its prefix cache with its own settings"),
    "all": ("vLLM, all states kept", "plain requests, prefix_cache_retention_interval=None"),
    "steps": ("vLLM, steps of a block", "the same, and max_num_batched_tokens of one block"),
}
ARMS = {f"{place}.{arm}": TITLES[arm] for place in PLACES for arm in TITLES}


class Prompts:
    """New ones, all equal in shape. `num_inside` and others: tokens that all children share."""

    def __init__(self, options: argparse.Namespace, block_size: int, vocab_size: int) -> None:
        self._dice, self._options, self._most = random.Random(0), options, min(vocab_size, 250)
        self.shared = {
            "inside": options.prefix, "end": options.prefix, "boundary": options.prefix // block_size * block_size
        }  # fmt: skip

    def tokens(self, num: int) -> tuple[int, ...]:
        return tuple(self._dice.randrange(3, self._most) for _ in range(num))

    def new(self, place: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """A prompt, and the children's suffixes."""
        prompt = self.tokens(self.shared[place] + (MORE if place == "inside" else 0))
        return prompt, [self.tokens(self._options.suffix) for _ in range(self._options.children)]


def thaws(repo: Repository, prompts: Prompts, place: str) -> Sample:
    shared = prompts.shared[place]
    prompt, suffixes = prompts.new(place)
    with repo.session(seed=1) as session:
        session.append(token_ids=prompt[:shared])
        if prompt[shared:]:
            session.append(token_ids=prompt[shared:])
        began = time.perf_counter()
        with session.fork(len(suffixes), at=shared) as children:
            outs = children.generate(token_ids=suffixes, sampling=FIRST)
            took = time.perf_counter() - began
    hits = r.Hits(
        num_prompt_tokens=sum(shared + len(suffix) for suffix in suffixes),
        num_wanted_tokens=(shared - 1) * len(outs),
        num_cached_tokens=sum(out.num_cached_tokens for out in outs),
        num_prefilled_tokens=sum(out.usage.num_prefilled_tokens for out in outs),
    )
    return sample(took, shared, [out.num_cached_tokens for out in outs], hits)


def stock(plain: Plain, prompts: Prompts, place: str) -> Sample:
    shared = prompts.shared[place]
    prompt, suffixes = prompts.new(place)
    plain.run([PlainRequest(tokens=prompt, max_tokens=1)])
    batch = plain.run([PlainRequest(tokens=prompt[:shared] + suffix, max_tokens=1) for suffix in suffixes])
    return sample(batch.first_token_s, shared, [one.num_cached_tokens for one in batch.results])


def sample(took: float, shared: int, cached: Sequence[int], hits: r.Hits | None = None) -> Sample:
    values = {"first_token_s": took, "cached_share": sum(cached) / (shared * len(cached))}
    return Sample(values=values, hits=hits, outputs={"cached": digest(json.dumps(sorted(cached)).encode())})


def seal(repo: Repository, rounds: Rounds, prompts: Prompts, options: argparse.Namespace) -> r.Receipt:
    engine = repo.engine

    def term(arm: str, value: str = "first_token_s") -> r.Term:
        return r.Term(arm=arm, value=value)

    def worded(arm: str) -> str:
        return f"{ARMS[arm][0]}, {PLACES[arm.partition('.')[0]]}"

    best = {place: min(STOCK, key=lambda arm: middle(rounds, f"{place}.{arm}")) for place in PLACES}
    derived = [r.median(f"{arm}.first", f"{worded(arm)}: all have a token", "s", term(arm)) for arm in ARMS]
    derived += [
        r.median(f"{arm}.cached", f"{worded(arm)}: share of the prefix found", "", term(arm, "cached_share"))
        for arm in ARMS
    ]
    for place in ("inside", "end"):
        text = f"the best of vLLM takes × thaw, {PLACES[place]}"
        derived.append(r.ratio(f"gain.{place}", text, term(f"{place}.{best[place]}"), term(f"{place}.thaw")))
    text = f"thaw takes × the best of vLLM, {PLACES['boundary']}"
    derived.append(r.ratio("over.boundary", text, term("boundary.thaw"), term(f"boundary.{best['boundary']}")))
    return r.make(
        kind="bench.recurrent-points-vllm",
        command=(
            f"python benchmarks/recurrent_points_vllm.py MODEL --prefix {options.prefix} --suffix {options.suffix} "
            f"--children {options.children} --rounds {options.rounds}"
        ),
        versions=software("torch", "vllm") | {engine.info.name: engine.info.version},
        machine=this_machine(accelerator(engine.info)),
        model=model_of(engine),
        parameters={
            "prefix_tokens": options.prefix, "boundary_tokens": prompts.shared["boundary"],
            "suffix_tokens": options.suffix, "children": options.children,
            **{f"best.{place}": arm for place, arm in best.items()}, **numerics(engine.info),
        },
        arms=arms_of(rounds.measured, list(ARMS).index, ARMS.__getitem__),
        derived=derived,
        checks=[
            r.all_hit(f"hit.{place}", f"thaw, {words}: nothing of the prefix is read again", f"{place}.thaw")
            for place, words in PLACES.items()
        ],
        goals=[
            r.at_least("inside", "at least 5 × sooner than the best of vLLM", "gain.inside", 5.0),
            r.at_least("end", "at least 1.3 × sooner than the best of vLLM", "gain.end", 1.3),
            r.at_most("boundary", "at most 1.05 × the best of vLLM", "over.boundary", 1.05),
        ],
        notes=(
            "A thaw session of a recurrent model goes on after all tokens but the last, which runs again with what "
            "follows: the shares found are of the whole prefix.",
        ),
    )  # fmt: skip


def settings_of(block_size: int) -> tuple[dict[str, Any], ...]:
    every: dict[str, Any] = {"prefix_cache_retention_interval": None}
    return {}, every, {**every, "max_num_batched_tokens": block_size}


def random_model(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    made: Path = import_module("kind_models").make_kind_model("qwen3_next", folder, dtype="bfloat16", **SHAPE)
    return made


def middle(rounds: Rounds, arm: str) -> float:
    taken = sorted(one.values["first_token_s"] for _, one in rounds.measured[arm])
    return taken[len(taken) // 2]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model", nargs="?", type=Path)
    words.add_argument("--prefix", type=int, default=3500)
    words.add_argument("--suffix", type=int, default=200)
    words.add_argument("--children", type=int, default=16)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--blocks", type=int, default=400, help="of each engine's cache")
    words.add_argument("--out", type=Path)
    options = words.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thaw-points-")))
        model = options.model or random_model(folder / "qwen3-next-random")
        boot: dict[str, Any] = {
            "model": str(model), "enable_prefix_caching": True, "enforce_eager": True,
            "max_model_len": options.prefix + options.suffix + MORE + 64, "num_gpu_blocks_override": options.blocks,
        }  # fmt: skip
        engine = stack.enter_context(thaw.load_engine("vllm", **boot))
        repo = stack.enter_context(thaw.open(folder / "repository", engine=engine, create=True))
        block = int(engine.info.numerics["block_size"])
        settings: dict[str, dict[str, Any]] = dict(zip(STOCK, settings_of(block), strict=True))
        stocks = {name: stack.enter_context(boot_stock(**boot, **more)) for name, more in settings.items()}
        prompts = Prompts(options, block, engine.info.vocab_size)
        rounds = Rounds(lambda line: print(line, flush=True))
        arms: dict[str, Any] = {}
        for place in PLACES:
            arms[f"{place}.thaw"] = partial(thaws, repo, prompts, place)
            arms |= {f"{place}.{name}": partial(stock, plain, prompts, place) for name, plain in stocks.items()}
        rounds.alternate(options.rounds, arms)
        receipt = seal(repo, rounds, prompts, options)
    tell(receipt, options.out)


if __name__ == "__main__":
    main()
