"""What `thaw bench pool` may be asked."""

from __future__ import annotations

from typing import Any

import msgspec

from thaw.core.errors import InvalidRequest

PARTS = ("round", "boot", "queue", "pressure")
WITH_OWN_CACHE = ("vllm",)
"""Engines whose own prefix cache the part `pressure` can fill."""
BLOCK_SIZE = 128
"""vLLM's own on a CPU."""
SUFFIX_TOKENS = 4
"""What every branch is asked."""


class PoolBenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One bench run. `engine` and `engine_options` are those of `load_engine`.

    round: `branches` of `branch_tokens` each, from a trunk of `trunk_tokens`, `rounds` times, in two workers. The round
    in the worker that has the point and the engine's own batch, whose difference is smaller than a busy machine's
    noise, alone and one right after the other, `same_rounds` times.
    `cold_rounds`: how often an engine is booted for a round. boot: a pool of one worker against the engine's own,
    `boot_rounds` times. queue: `points` of `queue_branches` each, submitted at once, on two workers of `max_batch`.
    pressure (vLLM alone): `pressure_points` of `pressure_trunk` tokens in one worker with blocks for 1/`pressure` of
    them, `pressure_branches` of `pressure_tokens` each from every one, right after it is read and in
    `pressure_returns` sweeps after that; all of it `pressure_rounds` times.
    `worker_env`: variables of each worker that takes rounds, such as the device that it may see.
    `parts`: empty for all that the engine can. `settle_s`: the pause before each arm of a round, for the threads of a
    worker spin for a while after its last step. `goals` False records figures only.
    """

    engine: str = "vllm"
    engine_options: dict[str, Any] = {}
    worker_env: tuple[dict[str, str], ...] = ()
    parts: tuple[str, ...] = ()
    trunk_tokens: int = 4096
    branches: tuple[int, ...] = (4, 16)
    branch_tokens: int = 64
    rounds: int = 6
    same_rounds: int = 24
    cold_rounds: int = 1
    boot_rounds: int = 3
    points: int = 8
    queue_branches: int = 32
    queue_tokens: int = 8
    queue_trunk: int = 256
    pressure: int = 3
    pressure_points: int = 24
    pressure_trunk: int = 1032
    pressure_branches: int = 4
    pressure_tokens: int = 8
    pressure_returns: int = 2
    pressure_rounds: int = 2
    max_batch: int = 16
    seed: int = 7
    settle_s: float = 1.0
    goals: bool = True
    command: str = ""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or len(set(self.parts)) != len(self.parts):
            raise InvalidRequest(f"parts={','.join(self.parts)}: must be some of {', '.join(PARTS)}, each once")
        if "pressure" in self.parts and self.engine not in WITH_OWN_CACHE:
            raise InvalidRequest(
                f"pressure is measured against the engine's own prefix cache: {', '.join(WITH_OWN_CACHE)} has one of "
                f"blocks that can be few, {self.engine} not"
            )
        for name, low, high in (
            ("trunk_tokens", 16, 1 << 20), ("branch_tokens", 1, 4096), ("rounds", 1, 1000), ("same_rounds", 1, 1000),
            ("cold_rounds", 0, 100), ("boot_rounds", 1, 100), ("points", 1, 1000), ("queue_branches", 1, 4096),
            ("queue_tokens", 1, 4096), ("queue_trunk", 16, 1 << 20), ("max_batch", 1, 1024),
            ("pressure", 1, 100), ("pressure_points", 2, 1000), ("pressure_trunk", 16, 1 << 20),
            ("pressure_branches", 1, 256), ("pressure_tokens", 1, 4096), ("pressure_returns", 1, 100),
            ("pressure_rounds", 1, 100),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise InvalidRequest(f"{name}={getattr(self, name)}: must be {low} to {high}")
        if any(not 1 <= n <= 256 for n in self.branches):
            raise InvalidRequest(f"branches={self.branches}: each must be 1 to 256")

    @property
    def measured_parts(self) -> tuple[str, ...]:
        able = self.engine in WITH_OWN_CACHE
        return self.parts or tuple(part for part in PARTS if able or part != "pressure")

    @property
    def block_size(self) -> int:
        return int(self.engine_options.get("block_size", BLOCK_SIZE))

    def few_blocks(self) -> dict[str, object]:
        """For `load_engine`: what was given, with blocks for 1/`pressure` of the points, or for one round at least."""
        size = self.block_size
        longest = self.pressure_trunk + SUFFIX_TOKENS + self.pressure_tokens
        point, whole = -(-self.pressure_trunk // size), -(-longest // size)
        one_round = point + self.pressure_branches * (whole - self.pressure_trunk // size)
        blocks = max(-(-self.pressure_points * point // self.pressure), one_round, whole + 1)
        own = 1  # vLLM keeps a block for itself
        few = {"block_size": size, "max_model_len": longest, "num_gpu_blocks_override": blocks + own}
        return {**self.engine_options, **few}

    def command_line(self, model: str) -> str:
        """The command that measures this again; no path is in it."""
        if self.command:
            return self.command
        usual = {field.name: field.default for field in msgspec.structs.fields(PoolBenchOptions)}
        words = [f"thaw bench pool --engine {self.engine} --model {model}"]
        given = {name: value for name, value in self.engine_options.items() if name != "model"}
        words += [f"--set {name}={msgspec.json.encode(value).decode()}" for name, value in sorted(given.items())]
        for name, flag in FLAGS.items():
            value = getattr(self, name)
            if value != usual[name]:
                words.append(f"{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return " ".join(words)


FLAGS = {
    "parts": "--only", "trunk_tokens": "--trunk-tokens", "branches": "--branches", "branch_tokens": "--branch-tokens",
    "rounds": "--rounds", "same_rounds": "--same-rounds", "cold_rounds": "--cold-rounds",
    "boot_rounds": "--boot-rounds", "points": "--points",
    "queue_branches": "--queue-branches", "queue_tokens": "--queue-tokens", "queue_trunk": "--queue-trunk",
    "max_batch": "--max-batch", "seed": "--seed", "pressure": "--pressure", "pressure_points": "--pressure-points",
    "pressure_trunk": "--pressure-trunk", "pressure_branches": "--pressure-branches",
    "pressure_tokens": "--pressure-tokens", "pressure_returns": "--pressure-returns",
    "pressure_rounds": "--pressure-rounds",
}  # fmt: skip


def quick(**others: object) -> PoolBenchOptions:
    """A run that takes every path once, with the least of everything: for tests, not for figures."""
    small: dict[str, object] = {
        "trunk_tokens": 300, "branches": (2,), "branch_tokens": 4, "rounds": 1, "same_rounds": 1, "boot_rounds": 1,
        "points": 3, "queue_branches": 4, "queue_tokens": 2, "queue_trunk": 32, "max_batch": 2, "settle_s": 0.0,
        "pressure_points": 5, "pressure_trunk": 260, "pressure_branches": 2, "pressure_tokens": 2,
        "pressure_returns": 1, "pressure_rounds": 1, "goals": False,
    }  # fmt: skip
    return msgspec.convert({**small, **others}, PoolBenchOptions)
