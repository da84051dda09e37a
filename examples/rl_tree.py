"""Tree rollouts: branch where the model was least sure, check every answer, credit each branch against its siblings.

    python examples/rl_tree.py path/to/model [--sum 14 9 12] [--levels 4] [--width 4] [--pivots 2] [--json]

A fork pool prefills a prompt of worked sums once. Level 1 is `width` answers to it. Each later level takes the `pivots`
most uncertain tokens of the previous level (by entropy over the full vocabulary) and forks `width` other continuations
there, in mid-sentence, with the KV from decoding. No token before a pivot is prefilled again.

The reward is computed, not judged: half for the first sum, half for the answer. The group at a pivot is the children
forked there and the existing continuation. A branch's advantage is its value (the mean reward of the answers below it)
against its group, in standard deviations of the group. Each sampled token is trained on once.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from thaw import Sampling
from thaw.pool import Branch, BranchResult, ForkPool

WORKED = [[random.Random(f"{i}/{k}").randint(2, 20) for k in range(3)] for i in range(24)]
SAMPLING = Sampling(temperature=1.0, max_tokens=40, stop=("\n",), entropy=True)
Reward = Callable[[str], float]


@dataclass
class Node:
    """One answer: its parent's tokens before `start`, then its own. `advantages`: from a token on, until the next."""

    level: int
    start: int
    result: BranchResult
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    reward: float = 0.0
    advantages: dict[int, float] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """Where the completion begins; the prompt is before it."""
        return len(self.result.trajectory.prompt_ids)

    @property
    def end(self) -> int:
        return self.first + len(self.result.token_ids)

    @property
    def own(self) -> tuple[int, ...]:
        return self.result.token_ids[self.start - self.first :]

    def entropy(self, at: int) -> float:
        """Of the choice of token `at`, in nats."""
        assert self.result.entropies is not None
        return self.result.entropies[at - self.first]

    def rewards(self, at: int) -> list[float]:
        """Of every answer that has this node's tokens up to and including `at`: its own, and those forked after."""
        below = (r for child in self.children if child.start > at for r in child.rewards(child.start))
        return [self.reward, *below]

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.walk()


def prompt_of(terms: Sequence[int]) -> str:
    return "".join(f"{question(worked)}{solved(worked)}\n\n" for worked in WORKED) + question(terms)


def question(terms: Sequence[int]) -> str:
    return f"{' + '.join(map(str, terms))}?\n"


def solved(terms: Sequence[int]) -> str:
    a, b, c = terms
    return f"{a} + {b} = {a + b}, and {a + b} + {c} = {a + b + c}. So it is {a + b + c}."


def check(terms: Sequence[int], text: str) -> float:
    """Half for stating the first sum rightly, half for the right answer."""
    first = re.search(rf"^{terms[0]} \+ {terms[1]} = (\d+)\b", text.strip())
    last = re.search(r"So it is (\d+)\.", text)
    right = first is not None and int(first[1]) == terms[0] + terms[1]
    return 0.5 * right + 0.5 * (last is not None and int(last[1]) == sum(terms))


def grow(
    pool: ForkPool, prompt: Sequence[int], reward: Reward, *, levels: int, width: int, pivots: int,
    sampling: Sampling, seed: int,
) -> list[Node]:  # fmt: skip
    """The roots of a tree of `levels` levels; every answer has its reward, every branch its advantages."""
    roots = [Node(1, len(prompt), result) for result in pool.fork(prompt, width, sampling, seed=seed)]
    level = roots
    for _ in range(levels - 1):
        level = branch(pool, uncertain(level, pivots), width)
    for node in walk(roots):
        node.reward = reward(node.result.text)
    credit(roots)
    return roots


def branch(pool: ForkPool, pivots: Sequence[tuple[Node, int]], width: int) -> list[Node]:
    """At each pivot `width` children that continue with the completion it cuts through; all rounds run at once."""
    rounds = [pool.submit(node.result, [Branch(resume=True)] * width, at=at) for node, at in pivots]
    for (node, at), round_ in zip(pivots, rounds, strict=True):
        node.children += [Node(node.level + 1, at, result, node) for result in round_.result()]
    return [child for node, at in pivots for child in node.children if child.start == at]


def walk(roots: Sequence[Node]) -> list[Node]:
    return [node for root in roots for node in root.walk()]


def uncertain(nodes: Sequence[Node], count: int) -> list[tuple[Node, int]]:
    """Each node's most uncertain own token, but its first (that choice was just branched); of these the top `count`."""
    tokens = [(node, range(node.start + 1, node.end)) for node in nodes]
    best = [(node, max(own, key=node.entropy)) for node, own in tokens if own]
    return sorted(best, key=lambda pivot: -pivot[0].entropy(pivot[1]))[:count]


def credit(roots: Sequence[Node]) -> None:
    """Group-relative advantages, at the prompt and at every pivot."""
    relative([(root, root.start) for root in roots])
    for node in walk(roots):
        for at in sorted({child.start for child in node.children}):
            relative([(node, at), *((child, at) for child in node.children if child.start == at)])


def relative(group: Sequence[tuple[Node, int]]) -> None:
    values = [statistics.fmean(node.rewards(at)) for node, at in group]
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    for (node, at), value in zip(group, values, strict=True):
        node.advantages[at] = (value - mean) / (deviation + 1e-4)


def training_row(node: Node) -> dict[str, Any]:
    """What a trainer takes of one answer: an advantage a token, and a mask that counts each token of the tree once."""
    t = node.result.trajectory
    base = len(t.prompt_ids)
    begins = [max((at for at in node.advantages if at <= base + i), default=None) for i in range(len(t.mask))]
    advantages = [0.0 if at is None else node.advantages[at] for at in begins]
    return {"prompt_ids": t.prompt_ids, "completion_ids": t.completion_ids, "logprobs": t.logprobs,
            "mask": t.own_mask, "advantages": advantages, "policy_versions": t.policy_versions,
            "reward": node.reward}  # fmt: skip


def account(nodes: Sequence[Node]) -> dict[str, float]:
    """Tokens that came before each branch, and those of them that ran through the model, as the engines counted."""
    points = {(id(node.parent), node.start, node.result.worker): node.result.decision for node in nodes}
    before = sum(node.start for node in nodes)
    prefilled = sum(node.result.usage.num_prefilled_tokens for node in nodes if node.result.usage)
    prefilled += sum(decision.num_prefilled_tokens for decision in points.values() if decision)
    return {
        "num_branches": len(nodes),
        "num_sampled_tokens": sum(len(node.own) for node in nodes),
        "num_tokens_before_branches": before,
        "num_prefilled_tokens": prefilled,
        "share_never_prefilled_again": 1.0 - prefilled / before,
    }


def draw(pool: ForkPool, node: Node, lead: str = "") -> None:
    """The node's own text, and its branches below it in order of their pivots."""
    marks = " ".join(f"{value:+.2f}" for _, value in sorted(node.advantages.items()))
    text = pool.decode(node.own).strip()
    print(f"{lead}{'└' if node.parent else '·'} reward {node.reward:.1f}  advantage {marks:<12} … {text!r}")
    for child in sorted(node.children, key=lambda child: child.start):
        draw(pool, child, lead + "  ")


def describe(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    number = {id(node): i for i, node in enumerate(nodes)}
    return [
        {
            "id": i, "parent": None if node.parent is None else number[id(node.parent)], "level": node.level,
            "at": node.start, "entropy": (node.parent or node).entropy(node.start), "text": node.result.text,
            "reward": node.reward, "advantages": sorted(node.advantages.items()), "worker": node.result.worker,
            "num_cached_tokens": node.result.num_cached_tokens,
        }
        for i, node in enumerate(nodes)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="tree rollouts with a checked reward")
    parser.add_argument("model")
    parser.add_argument("--sum", type=int, nargs=3, default=(14, 9, 12), dest="terms")
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--pivots", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with ForkPool(asked.engine, workers=asked.workers, model=asked.model) as pool:
        prompt = pool.encode(prompt_of(asked.terms))
        roots = grow(
            pool, prompt, lambda text: check(asked.terms, text), levels=asked.levels, width=asked.width,
            pivots=asked.pivots, sampling=SAMPLING, seed=asked.seed,
        )  # fmt: skip
        nodes, totals = walk(roots), account(walk(roots))
        if asked.json:
            rows = [training_row(node) for node in nodes]
            print(json.dumps({"totals": totals, "nodes": describe(nodes), "rows": rows}))
            return
        print(f"{question(asked.terms)!r}: {sum(asked.terms)}; a prompt of {len(prompt)} tokens")
        for root in roots:
            draw(pool, root)
        print(
            f"{totals['num_branches']} branches, {totals['num_tokens_before_branches']} tokens before them, "
            f"{totals['num_prefilled_tokens']} run through the model: "
            f"{totals['share_never_prefilled_again']:.2%} were never prefilled again"
        )


if __name__ == "__main__":
    main()
