"""What `thaw bench vllm` may be asked."""

from __future__ import annotations

from pathlib import Path

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.engines.vllm.settings import VllmSettings

PARTS = ("hydrate", "fork", "pressure", "idle")
MORE_PARTS = ("dma", "first", "gap")
"""Measured where they are asked for: what they are about is an accelerator's."""
SUFFIX_TOKENS = 4
"""What every child is asked."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One bench run. `engine_options` are those of `load_engine("vllm", …)`; `model` among them must be given.

    `parts`: which to measure. `block_size`: tokens a block (128 is vLLM's own on a CPU, 16 on a GPU). `eager` False
    lets vLLM compile the model first, which takes minutes on a CPU and did not make it faster there.

    hydrate: sessions of `lengths` tokens, `hydrate_rounds` times each. fork: groups of `children`, `child_tokens` each,
    from a session of `fork_tokens` (a multiple of `block_size` is where vLLM's cache recomputes nothing), `rounds`
    times. pressure: `trees` sessions of `tree_tokens`, each visited once when it is made and `returns` times after
    that, `branches` children of `branch_tokens` a visit, in blocks for 1/`pressure` of the sessions; `pressure_rounds`
    times; `offload_gib` of host memory, if any, are given to a third arm, vLLM's own offload tier (GPU only). idle:
    `idle_requests` of `idle_prompt` tokens, `idle_tokens` generated, `idle_rounds` times in each of `idle_boots` boots,
    the first of them number `first_boot`. dma: copies of `lengths` tokens, `copy_rounds` times each. first: groups of
    `first_children` from sessions of `lengths` tokens, `first_rounds` times. gap: a session of `gap_tokens` tokens is
    captured, hydrated or admitted while `gap_others` requests of `gap_prompt` tokens decode, `gap_steps` tokens each at
    least and `gap_most` at most, `gap_rounds` times.

    `settle_s`: the pause before each arm of a round, for an engine's threads spin for a while after its last step.
    `folder`: where the repository of the run is made and removed again. `goals` False records figures only.
    """

    engine_options: dict[str, object] = {}
    parts: tuple[str, ...] = PARTS
    block_size: int = 128
    eager: bool = True
    lengths: tuple[int, ...] = (1000, 2000, 4000, 7500)
    hydrate_rounds: int = 5
    fork_tokens: int = 1024
    children: tuple[int, ...] = (4, 16)
    child_tokens: int = 64
    rounds: int = 10
    trees: int = 24
    tree_tokens: int = 1000
    branches: int = 4
    branch_tokens: int = 16
    returns: int = 2
    pressure: int = 3
    pressure_rounds: int = 1
    offload_gib: int = 0
    idle_requests: int = 16
    idle_prompt: int = 128
    idle_tokens: int = 64
    idle_rounds: int = 4
    idle_boots: int = 6
    first_boot: int = 0
    copy_rounds: int = 8
    first_children: tuple[int, ...] = (1, 4)
    first_rounds: int = 8
    gap_tokens: int = 1000
    gap_others: int = 8
    gap_prompt: int = 64
    gap_steps: int = 64
    gap_most: int = 1024
    gap_rounds: int = 5
    seed: int = 7
    settle_s: float = 1.0
    folder: Path | None = None
    goals: bool = True
    command: str = ""

    def __post_init__(self) -> None:
        if not self.engine_options.get("model"):
            raise InvalidRequest("the bench needs a model: give its folder (or hub id)")
        unknown = [part for part in self.parts if part not in PARTS + MORE_PARTS]
        if unknown or not self.parts or len(set(self.parts)) != len(self.parts):
            raise InvalidRequest(
                f"parts={','.join(self.parts)}: must be some of {', '.join(PARTS + MORE_PARTS)}, each once"
            )
        for name, low, high in (
            ("block_size", 8, 1024), ("hydrate_rounds", 1, 1000), ("fork_tokens", 16, 1 << 20),
            ("child_tokens", 1, 4096), ("rounds", 1, 1000), ("trees", 2, 1000), ("tree_tokens", 16, 1 << 20),
            ("branches", 1, 64), ("branch_tokens", 1, 4096), ("returns", 1, 100), ("pressure", 1, 100),
            ("pressure_rounds", 1, 100), ("offload_gib", 0, 4096), ("idle_requests", 1, 256),
            ("idle_prompt", 1, 1 << 20), ("idle_tokens", 1, 4096), ("idle_rounds", 1, 1000), ("idle_boots", 1, 100),
            ("first_boot", 0, 100), ("copy_rounds", 1, 1000), ("first_rounds", 1, 1000), ("gap_tokens", 16, 1 << 20),
            ("gap_others", 1, 256), ("gap_prompt", 1, 1 << 20), ("gap_steps", 4, 4096), ("gap_most", 4, 1 << 16),
            ("gap_rounds", 1, 1000),
        ):  # fmt: skip
            _range(name, getattr(self, name), low, high)
        for length in self.lengths:
            _range("lengths", length, 16, 1 << 20)
        for name in ("children", "first_children"):
            for n in getattr(self, name):
                _range(name, n, 1, 64)

    @property
    def longest(self) -> int:
        """Tokens that the longest request of the parts has, its generated ones included."""
        need = {
            "hydrate": max(self.lengths, default=0) + SUFFIX_TOKENS + 1,
            "fork": self.fork_tokens + SUFFIX_TOKENS + self.child_tokens,
            "pressure": self.pressure_longest,
            "idle": self.idle_prompt + self.idle_tokens,
            "dma": 0,
            "first": max(self.lengths, default=0) + SUFFIX_TOKENS + 1,
            "gap": max(self.gap_tokens, self.gap_prompt) + self.gap_most,
        }
        return max(need[part] for part in self.parts)

    @property
    def pressure_longest(self) -> int:
        return self.tree_tokens + SUFFIX_TOKENS + self.branch_tokens

    @property
    def few_longest(self) -> int:
        """The limit of the engine with few blocks. Where what it stores is compared bit for bit with what another
        engine makes of it, both have the same one: it may decide how attention is split."""
        return self.longest if "hydrate" in self.parts else self.pressure_longest

    @property
    def tree_blocks(self) -> int:
        """Blocks of one session under pressure."""
        return -(-self.tree_tokens // self.block_size)

    @property
    def few_blocks(self) -> int:
        """1/`pressure` of what the sessions under pressure fill, or what the longest request and the largest visit need
        at least; vLLM keeps one block for itself."""
        share = -(-self.trees * self.tree_blocks // self.pressure)
        own = -(-self.pressure_longest // self.block_size) - self.tree_tokens // self.block_size
        longest = -(-self.few_longest // self.block_size)
        return max(share, self.tree_blocks + self.branches * own, longest + 1) + 1

    def boot_options(self, **others: object) -> dict[str, object]:
        """For `load_engine`: what was given, and what all engines of the run have in common."""
        return {"enforce_eager": self.eager, "block_size": self.block_size, **self.engine_options, **others}

    def stock_options(self, **others: object) -> dict[str, object]:
        """The same for a vLLM without thaw."""
        ours = {"policy", *VllmSettings.__struct_fields__}
        return {name: value for name, value in self.boot_options(**others).items() if name not in ours}

    def command_line(self, model: str) -> str:
        """The command that measures this again; no path is in it."""
        if self.command:
            return self.command
        usual = {field.name: field.default for field in msgspec.structs.fields(Options)}
        words = [f"thaw bench vllm --model {model}"]
        for name, flag in FLAGS.items():
            value = getattr(self, name)
            if value != usual[name]:
                words.append(f"{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return " ".join([*words, *(() if self.eager else ("--compile",))])


FLAGS = {
    "parts": "--only", "block_size": "--block-size", "lengths": "--lengths", "hydrate_rounds": "--hydrate-rounds",
    "fork_tokens": "--fork-tokens", "children": "--children", "child_tokens": "--child-tokens", "rounds": "--rounds",
    "trees": "--trees", "tree_tokens": "--tree-tokens", "branches": "--branches", "branch_tokens": "--branch-tokens",
    "returns": "--returns", "pressure": "--pressure", "pressure_rounds": "--pressure-rounds",
    "offload_gib": "--offload-gib",
    "idle_requests": "--idle-requests", "idle_prompt": "--idle-prompt", "idle_tokens": "--idle-tokens",
    "idle_rounds": "--idle-rounds", "idle_boots": "--idle-boots", "first_boot": "--first-boot",
    "copy_rounds": "--copy-rounds", "first_children": "--first-children", "first_rounds": "--first-rounds",
    "gap_tokens": "--gap-tokens", "gap_others": "--gap-others", "gap_prompt": "--gap-prompt",
    "gap_steps": "--gap-steps", "gap_most": "--gap-most", "gap_rounds": "--gap-rounds", "seed": "--seed",
}  # fmt: skip
"""Options by the command line's names."""


def quick(**others: object) -> Options:
    """A run that takes every path once, with the least of everything: for tests, not for figures."""
    small: dict[str, object] = {
        "lengths": (300,), "hydrate_rounds": 1, "fork_tokens": 256, "children": (4,), "child_tokens": 4, "rounds": 1,
        "trees": 6, "tree_tokens": 300, "branches": 2, "branch_tokens": 2, "returns": 1, "idle_requests": 2,
        "idle_prompt": 32, "idle_tokens": 4, "idle_rounds": 2, "idle_boots": 1, "settle_s": 0.0, "goals": False,
        "copy_rounds": 1, "first_children": (1, 2), "first_rounds": 1, "gap_tokens": 300, "gap_others": 3,
        "gap_prompt": 16, "gap_steps": 8, "gap_most": 512, "gap_rounds": 1,
    }  # fmt: skip
    return msgspec.convert({**small, **others}, Options)


def _range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name}={value}: must be {low} to {high}")
