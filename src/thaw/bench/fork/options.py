"""What `thaw bench fork` may be asked."""

from __future__ import annotations

from pathlib import Path

import msgspec

from thaw.core.errors import InvalidRequest

SUFFIXES = ("Why?", "How?", "Who?", "When?", "What?", "Where?", "Which?", "Is it?")
SUFFIX_TOKENS = 4


class ForkBenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One bench run. The first `num_tokens` of `document` (None: thaw's own sentences) are the session to be forked.

    `children` go on for `child_tokens` each. `rounds` are measured in this process, `fresh_rounds` of them also in
    fresh processes. `stock`: also time the model's own prefill where the engine has one (a second copy of the weights
    in memory). `disk_children` × `disk_tokens`: the forks whose size on disk is measured; 0 leaves that out. `folder`:
    where the repository of the run is made and removed again (default: the system's folder for temporary files).
    `goals` False records figures only.
    """

    engine: str = "transformers"
    engine_options: dict[str, object] = {}
    document: str | None = None
    num_tokens: int = 3500
    children: int = 4
    child_tokens: int = 16
    rounds: int = 5
    fresh_rounds: int = 3
    stock: bool = True
    disk_children: int = 12
    disk_tokens: int = 64
    seed: int = 7
    folder: Path | None = None
    goals: bool = True
    process_timeout_s: float = 900.0
    command: str = ""

    def __post_init__(self) -> None:
        _range("num_tokens", self.num_tokens, 16, 1 << 22)
        _range("children", self.children, 2, 64)
        _range("child_tokens", self.child_tokens, 1, 4096)
        _range("rounds", self.rounds, 1, 1000)
        _range("fresh_rounds", self.fresh_rounds, 0, self.rounds)
        _range("disk_children", self.disk_children, 0, 64)
        _range("disk_tokens", self.disk_tokens, 1, 4096)

    def command_line(self, model: str) -> str:
        """The command that measures this again; no path is in it."""
        if self.command:
            return self.command
        named = f" --model {model}" if self.engine_options.get("model") else ""
        return (
            f"thaw bench fork --engine {self.engine}{named} --tokens {self.num_tokens} --children {self.children}"
            f" --child-tokens {self.child_tokens} --rounds {self.rounds} --fresh-rounds {self.fresh_rounds}"
        )


def quick(engine: str = "fake", **others: object) -> ForkBenchOptions:
    """A run of seconds that takes every path once: for tests, not for figures."""
    small: dict[str, object] = {
        "num_tokens": 600, "child_tokens": 4, "rounds": 2, "fresh_rounds": 1, "disk_children": 3, "disk_tokens": 4,
        "goals": False,
    }  # fmt: skip
    return msgspec.convert({"engine": engine, **small, **others}, ForkBenchOptions)


def _range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name}={value}: must be {low} to {high}")
