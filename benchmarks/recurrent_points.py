"""First tokens of children that begin at a point inside a prompt, on a model with recurrent layers, on `transformers`.

    python benchmarks/recurrent_points.py MODEL [--prefix 3500] [--suffix 200] [--children 16] [--rounds 5] [--out FILE]

A prompt of `prefix` tokens is read once, and continues with some of its own. Then children begin at the end of those
`prefix` tokens (a multiple of the kernel's chunk below), each with a suffix of its own. What is measured is the time
until all of them have their first token. Arms, alternating, in one process and with the same weights:

    thaw          the point was asked for ahead; the live session is forked there
    thaw-disk     the same from the repository's packs, verified
    stock-copy    transformers alone, its best way: its cache was deep-copied at the point, when it came by, and each
                  child gets a copy of that
    stock-end     transformers alone with the cache of the prompt's end, from which no earlier token can be reached:
                  the prefix is read again, once, and copied for each child

Children run one after the other in all arms: transformers' cache of recurrent layers has no method that repeats it for
a batch.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import thaw
from thaw import Sampling
from thaw import receipt as r
from thaw.bench.rounds import Rounds, arms_of
from thaw.bench.sample import Sample
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.told import tell
from thaw.core.ids import digest
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository, Session

FIRST = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
MORE = 100
"""Tokens that the prompt continues with behind the point."""
ARMS = {
    "thaw": ("thaw, live", "fork the session at the point, prefill each suffix, until all have a token"),
    "thaw-disk": ("thaw, from disk", "the same, the point read from the packs and verified"),
    "stock-copy": ("transformers, copied", "a deep copy of the cache kept at the point, and each suffix, one by one"),
    "stock-end": ("transformers, read again", "the prefix once more, then a deep copy and a suffix for each child"),
}


class Bench:
    """`num_points` tokens are the prefix: as many as were asked for, down to a multiple of 64."""

    def __init__(self, repo: Repository, model: str, options: argparse.Namespace) -> None:
        dice = random.Random(0)
        self.repo, self.prefix = repo, options.prefix // 64 * 64
        tokens = [dice.randrange(3, 250) for _ in range(self.prefix + MORE)]
        self.prompt, self.begin = tokens, tokens[: self.prefix]
        self.suffixes = [[dice.randrange(3, 250) for _ in range(options.suffix)] for _ in range(options.children)]
        self.session: Session = repo.session(seed=1)
        self.session.append(token_ids=tokens, points=[self.prefix])
        self.session.commit("read", branch="main")
        self.module: Any = AutoModelForCausalLM.from_pretrained(model).eval()
        self.at_point = DynamicCache(config=self.module.config)
        self.read(self.begin, 0, self.at_point)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], start: int, cache: DynamicCache) -> int:
        """The likeliest token after `tokens`."""
        places = torch.arange(start, start + len(tokens))[None]
        out = self.module(
            torch.tensor([list(tokens)]), position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return int(out.logits[0, -1].argmax())

    def live(self) -> Sample:
        began = time.perf_counter()
        return self._forked(self.session.fork(len(self.suffixes), at=self.prefix), began)

    def from_disk(self) -> Sample:
        began = time.perf_counter()
        return self._forked(self.repo.fork(f"main:token={self.prefix}", len(self.suffixes)), began)

    def _forked(self, children: Any, began: float) -> Sample:
        with children:
            outs = [kid.generate(token_ids=s, sampling=FIRST) for kid, s in zip(children, self.suffixes, strict=True)]
            took = time.perf_counter() - began
        hits = r.Hits(
            num_prompt_tokens=sum(self.prefix + len(s) for s in self.suffixes),
            num_wanted_tokens=self.prefix * len(outs),
            num_cached_tokens=sum(out.num_cached_tokens for out in outs),
            num_prefilled_tokens=sum(out.usage.num_prefilled_tokens for out in outs),
        )
        return self._sample(took, [out.token_ids[0] for out in outs], hits)

    def copied(self) -> Sample:
        began = time.perf_counter()
        said = self._each(self.at_point)
        return self._sample(time.perf_counter() - began, said)

    def read_again(self) -> Sample:
        began = time.perf_counter()
        cache = DynamicCache(config=self.module.config)
        self.read(self.begin, 0, cache)
        said = self._each(cache)
        return self._sample(time.perf_counter() - began, said)

    def _each(self, cache: DynamicCache) -> list[int]:
        return [self.read(suffix, self.prefix, copy.deepcopy(cache)) for suffix in self.suffixes]

    @staticmethod
    def _sample(took: float, said: list[int], hits: r.Hits | None = None) -> Sample:
        return Sample(values={"first_token_s": took}, hits=hits, outputs={"tokens": digest(json.dumps(said).encode())})

    def arms(self) -> dict[str, Any]:
        return dict(zip(ARMS, (self.live, self.from_disk, self.copied, self.read_again), strict=True))


def seal(bench: Bench, rounds: Rounds, options: argparse.Namespace) -> r.Receipt:
    engine = bench.repo.engine

    def first(arm: str) -> r.Term:
        return r.Term(arm=arm, value="first_token_s")

    asked = [
        *(r.median(f"{arm}.first", f"{ARMS[arm][0]}: all children have a token", "s", first(arm)) for arm in ARMS),
        r.ratio("over.copied", "thaw, live, takes × transformers' copied cache", first("thaw"), first("stock-copy")),
        r.ratio("over.disk", "thaw, from disk, takes × the copied cache", first("thaw-disk"), first("stock-copy")),
        r.ratio("gain.again", "transformers reading again takes × thaw", first("stock-end"), first("thaw")),
    ]
    return r.make(
        kind="bench.recurrent-points",
        command=(
            f"python benchmarks/recurrent_points.py MODEL --prefix {options.prefix} --suffix {options.suffix} "
            f"--children {options.children} --rounds {options.rounds}"
        ),
        versions=software("torch", "transformers") | {engine.info.name: engine.info.version},
        machine=this_machine(accelerator(engine.info)),
        model=model_of(engine),
        parameters={
            "prefix_tokens": bench.prefix, "suffix_tokens": options.suffix, "children": options.children,
            **numerics(engine.info),
        },
        arms=arms_of(rounds.measured, list(ARMS).index, ARMS.__getitem__),
        derived=asked,
        checks=[
            r.all_hit("hit.thaw", "thaw, live: nothing of the prefix prefilled again", "thaw"),
            r.all_hit("hit.disk", "thaw, from disk: nothing of the prefix prefilled again", "thaw-disk"),
            r.equal_outputs("disk", "live, from disk: the same tokens", "thaw", "thaw-disk", "tokens", promised=True),
            r.equal_outputs("stock", "the same tokens as transformers", "thaw", "stock-copy", "tokens", promised=False),
        ],
        goals=[r.at_most("copied", "at most 1.05 × transformers' copied cache", "over.copied", 1.05)],
        notes=(
            "The copied cache is transformers' best way, and needs to be told of the point ahead, as thaw is.",
            "Children run one after the other in all arms.",
        ),
    )  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model")
    words.add_argument("--prefix", type=int, default=3500)
    words.add_argument("--suffix", type=int, default=200)
    words.add_argument("--children", type=int, default=16)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--out", type=Path)
    options = words.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="thaw-points-") as folder,
        thaw.load_engine("transformers", model=options.model) as engine,
        thaw.open(folder, engine=engine) as repo,
    ):
        bench = Bench(repo, options.model, options)
        rounds = Rounds(lambda line: print(line, flush=True))
        rounds.alternate(options.rounds, bench.arms())
        receipt = seal(bench, rounds, options)
    tell(receipt, options.out)


if __name__ == "__main__":
    main()
