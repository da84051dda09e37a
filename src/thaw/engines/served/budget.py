"""What one caller, and what all of them, may keep in an engine: KV in memory and in files, records, held commands.

A caller is a client of thaw's, by the name that it put into the mail. Those without a name, who may only send requests
(they have the server's API key, say), are one caller together: a guest. The error of a refusal names the limit that was
reached, and no caller loses what it has because of another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

from thaw.core.errors import Busy

Caller: TypeAlias = str
GUEST: Final[Caller] = ""
EVERYBODY: Final[Caller] = "*"
"""Stands for any caller who has nothing yet."""
MAX_RECORDS = 100_000
MAX_COMMANDS = 1_024
"""Commands that an engine holds, or works at, at one time."""


@dataclass(frozen=True)
class Shares:
    """The part of everything that one caller may have, and that all guests together may have."""

    caller: float = 1.0
    guests: float = 1.0

    def of(self, caller: Caller, whole: int) -> int:
        return int(whole * (self.guests if caller == GUEST else self.caller))

    def option(self, caller: Caller) -> str:
        """The setting that says so."""
        return f"guest_fraction {self.guests:g}" if caller == GUEST else f"caller_fraction {self.caller:g}"


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens of KV more a caller may keep, and the limits that say so. `num_early`: with a request that its
    client may end early, where such a one keeps more than its tokens and its end. `state_tokens`: how many tokens a
    state takes the room of."""

    num_tokens: int
    why: str
    num_early: int | None = None
    state_tokens: int = 0

    @property
    def least(self) -> int:
        """For whatever request."""
        return self.num_tokens if self.num_early is None else self.num_early

    def require(self, num_tokens: int, *, ends_early: bool = False, num_states: int = 0) -> None:
        """Raises `Busy` where that is more. `num_states`: beside that of the end, and those of an early one."""
        if num_tokens + num_states * self.state_tokens > (self.least if ends_early else self.num_tokens):
            states = f" and {num_states:,} states at points" if num_states else ""
            raise Busy(
                f"no room to keep {num_tokens:,} tokens{states}: {self.why}; close sessions, or start the engine with "
                "more"
            )


class Budget:
    """How much of `what` there may be: `whole` in all, and of each caller its share. Not safe for several threads."""

    def __init__(self, what: str, whole: int, shares: Shares, shown: Callable[[int], str] = "{:,}".format) -> None:
        self._what, self._whole, self._shares, self._shown = what, whole, shares, shown
        self._used: Counter[Caller] = Counter()
        self.total = 0

    def callers(self) -> list[Caller]:
        """Those that have some."""
        return list(self._used)

    def refusal(self, caller: Caller, more: int = 1) -> str:
        """Why `caller` may not have `more` of them; empty where it may."""
        used, limit = self._used[caller], self._shares.of(caller, self._whole)
        if self.total + more > self._whole:
            return f"{self._what}: all callers together have {self._shown(self.total)} of {self._shown(self._whole)}"
        if used + more > limit:
            option = self._shares.option(caller)
            return f"{self._what}: {_who(caller)} {self._shown(used)} of {self._shown(limit)} ({option})"
        return ""

    def left(self, caller: Caller) -> int:
        """How many more `caller` may have."""
        return max(0, min(self._whole - self.total, self._shares.of(caller, self._whole) - self._used[caller]))

    def require(self, caller: Caller, more: int = 1) -> None:
        """Raises `Busy` saying which limit was reached."""
        if why := self.refusal(caller, more):
            raise Busy(f"{why}; try again when some have ended, or start the engine with a larger part")

    def take(self, caller: Caller, count: int = 1) -> None:
        self._used[caller] += count
        self.total += count

    def give_back(self, caller: Caller, count: int = 1) -> None:
        self.total -= count
        self._used[caller] -= count
        if not self._used[caller]:
            del self._used[caller]


def mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"


def _who(caller: Caller) -> str:
    return "callers that do not share the engine's mail folder have" if caller == GUEST else "this caller has"
