"""The tree of examples/rl_tree.py: pivots, shared tokens, advantages and masks against their definitions."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thaw import Sampling
from thaw.pool import ForkPool

EXAMPLE = Path(__file__).parents[2] / "examples" / "rl_tree.py"
SAMPLING = Sampling(temperature=1.0, max_tokens=24, ignore_eos=True, entropy=True)
PROMPT = list(b"Every branch of the tree has these tokens. ")


def even(text: str) -> float:
    """A reward that can be checked on random text."""
    return sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], Any]) -> Any:
    return load_example("rl_tree")


def planted(example: Any, pool: ForkPool, **size: int) -> list[Any]:
    sizes = {"levels": 4, "width": 3, "pivots": 2} | size
    return example.grow(pool, PROMPT, even, sampling=SAMPLING, seed=7, **sizes)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tree(example: Any) -> Iterator[tuple[Any, list[Any]]]:
    with ForkPool("fake", backend="inline") as pool:
        roots = planted(example, pool)
        yield roots, example.walk(roots)


def path(node: Any) -> list[tuple[Any, int]]:
    """(node, tokens of it that the answer has) from the root down to the answer itself."""
    way, end = [], node.end
    while node is not None:
        way.append((node, end))
        node, end = node.parent, node.start
    return way[::-1]


def test_four_levels_grow_from_the_pivots_of_the_level_before(tree: Any) -> None:
    roots, nodes = tree
    assert [sum(n.level == k for n in nodes) for k in (1, 2, 3, 4)] == [3, 6, 6, 6]
    assert all(n.parent.level == n.level - 1 and n.parent.start < n.start < n.parent.end for n in nodes if n.parent)
    assert all(n.start == len(PROMPT) for n in roots)


def test_a_pivot_is_the_most_uncertain_token_of_its_node_and_these_nodes_the_most_uncertain(tree: Any) -> None:
    _, nodes = tree
    for level in (1, 2, 3):
        peaks = {id(n): max(map(n.entropy, range(n.start + 1, n.end))) for n in nodes if n.level == level}
        chosen = {id(n): n for n in nodes if n.level == level and n.children}
        assert sorted(peaks[i] for i in chosen) == sorted(peaks.values())[-2:]
        for i, node in chosen.items():
            assert {node.entropy(child.start) for child in node.children} == {peaks[i]}


def test_a_child_has_its_parents_tokens_and_logprobs_up_to_the_pivot_and_its_own_after(tree: Any) -> None:
    _, nodes = tree
    for node in (n for n in nodes if n.parent):
        ours, theirs = node.result.trajectory, node.parent.result.trajectory
        shared = node.start - len(PROMPT)
        assert ours.completion_ids[:shared] == theirs.completion_ids[:shared]
        assert ours.logprobs[:shared] == theirs.logprobs[:shared]
        assert ours.prompt_ids == tuple(PROMPT) and len(ours.completion_ids) == 24 and ours.plain_sampling
        assert ours.policy_versions == ("0",) * 24
    apart = [n for n in nodes if n.parent and n.result.token_ids != n.parent.result.token_ids]
    assert len(apart) >= 15  # of 18: with a token or two to go, a child may say what its parent said


def test_nothing_before_a_branch_is_prefilled_again_but_the_last_token(example: Any, tree: Any) -> None:
    _, nodes = tree
    assert all(n.result.num_cached_tokens == n.start - (n.parent is not None) for n in nodes)
    totals = example.account(nodes)
    assert totals["num_prefilled_tokens"] == len(PROMPT) + sum(n.parent is not None for n in nodes)
    assert totals["num_tokens_before_branches"] == sum(n.start for n in nodes)


def test_a_value_is_the_mean_reward_of_the_answers_below_and_advantages_are_relative_to_the_group(tree: Any) -> None:
    """Values once more from the answers' own paths, without the tree's recursion."""
    _, nodes = tree
    assert all(node.reward == even(node.result.text) for node in nodes)

    def value(node: Any, at: int) -> float:
        """Answers that have token `at` of `node`."""
        return statistics.fmean(n.reward for n in nodes if any(m is node and end > at for m, end in path(n)))

    groups: dict[tuple[int, int], list[tuple[Any, int]]] = {}
    for node in nodes:
        groups.setdefault((id(node.parent), node.start), []).append((node, node.start))
    for (_, at), members in groups.items():
        if members[0][0].parent is not None:
            members.append((members[0][0].parent, at))
        values = [value(node, at) for node, _ in members]
        assert len(set(values)) > 1
        for (node, _), mine in zip(members, values, strict=True):
            expected = (mine - statistics.fmean(values)) / (statistics.pstdev(values) + 1e-4)
            assert node.advantages[at] == pytest.approx(expected)
        assert sum(node.advantages[at] for node, _ in members) == pytest.approx(0.0, abs=1e-9)
    assert sum(len(members) for members in groups.values()) == sum(len(n.advantages) for n in nodes)


def test_equal_rewards_give_no_advantage(example: Any) -> None:
    with ForkPool("fake", backend="inline") as pool:
        roots = example.grow(
            pool, PROMPT, lambda _: 1.0, levels=2, width=2, pivots=1, sampling=SAMPLING, seed=7
        )  # fmt: skip
        assert {value for node in example.walk(roots) for value in node.advantages.values()} == {0.0}


def test_every_sampled_token_is_trained_on_once_with_the_advantage_of_its_branch(example: Any, tree: Any) -> None:
    _, nodes = tree
    rows = [example.training_row(node) for node in nodes]
    assert sum(sum(row["mask"]) for row in rows) == example.account(nodes)["num_sampled_tokens"]
    for node, row in zip(nodes, rows, strict=True):
        own = [len(PROMPT) + i for i, m in enumerate(row["mask"]) if m]
        assert own == list(range(node.start, node.end))
        turns = sorted(node.advantages)
        for i in own:
            assert row["advantages"][i - len(PROMPT)] == node.advantages[max(at for at in turns if at <= i)]


def test_the_reward_checks_the_sum(example: Any) -> None:
    terms = (14, 9, 12)
    right = example.solved(terms)
    assert right == "14 + 9 = 23, and 23 + 12 = 35. So it is 35."
    assert example.check(terms, right) == 1.0 == example.check(terms, " " + right)
    assert example.check(terms, "14 + 9 = 23, and 23 + 12 = 45. So it is 45.") == 0.5
    assert example.check(terms, "14 + 9 = 13, and 13 + 12 = 35. So it is 35.") == 0.5
    assert example.check(terms, "14 + 9 = 233, and so on. So it is 355.") == 0.0 == example.check(terms, "")
    assert all(example.check(worked, example.solved(worked)) == 1.0 for worked in example.WORKED)


def test_logprobs_at_and_after_a_pivot_are_those_of_the_stock_model(
    example: Any, tiny_model: Callable[..., Path]
) -> None:
    """And with the negative control: another branch's prefix gives others."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()

    def stock(prompt: Any, completion: Any) -> list[float]:
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1)[range(len(completion)), list(completion)].tolist()  # type: ignore[no-any-return]

    with ForkPool("transformers", backend="inline", model=str(tiny_model("llama"))) as pool:
        nodes = example.walk(planted(example, pool, width=2, pivots=1))
    for node in nodes:
        t = node.result.trajectory
        assert stock(t.prompt_ids, t.completion_ids) == pytest.approx(t.logprobs, abs=1e-3)
        wrong = (t.completion_ids[0] ^ 1, *t.completion_ids[1:])
        assert stock(t.prompt_ids, wrong)[1:] != pytest.approx(t.logprobs[1:], abs=1e-2)


def test_the_tree_on_the_real_model(demo_model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(demo_model), "--width", "2", "--pivots", "2", "--json"],
        cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    nodes, totals = found["nodes"], found["totals"]
    assert {node["level"] for node in nodes} == {1, 2, 3, 4} and len(nodes) == 2 + 3 * 4
    assert totals["share_never_prefilled_again"] > 0.9
    assert totals["num_prefilled_tokens"] == nodes[0]["at"] + 12
    assert sum(sum(row["mask"]) for row in found["rows"]) == totals["num_sampled_tokens"]
    assert any("= 2" in node["text"] for node in nodes), [node["text"] for node in nodes]


@pytest.mark.slow("imports torch in a process of its own")
def test_it_prints_the_tree(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tiny_model("llama")), "--width", "2", "--pivots", "1", "--levels", "2"],
        cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("'14 + 9 + 12?\\n': 35") and "never prefilled again" in lines[-1]
    assert sum(line.lstrip().startswith(("·", "└")) for line in lines) == 4
