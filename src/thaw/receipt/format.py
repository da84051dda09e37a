"""What a receipt is: the measured record of a run, in which every figure can be computed again from the rounds.

    receipt ─┬─ versions, machine, model, parameters, command     what ran, where (no host name, no path, no prompt)
             ├─ arms ── rounds                                     what was measured: the only raw numbers
             ├─ checks                                             counts over the rounds: equal outputs, engine's hits
             ├─ derived                                            medians and ratios over the rounds
             ├─ goals                                              a derived number against a bound
             └─ digest                                             BLAKE3 of the canonical JSON of all the above

`derived`, `checks` and `goals` say what they are computed from, in a vocabulary small enough that `verify` computes all
of them again. A digest finds changes; it does not say who made them: anyone who can write the file can make another.
The JSON schema of these structs is `schema.json` beside this file.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

TYPE = "thaw.receipt/1"
MAX_BYTES = 8 << 20
MAX_DEPTH = 12
MAX_ARMS = 64
MAX_ROUNDS = 10_000

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]*$(?!\n)", max_length=80)]
Text = Annotated[str, msgspec.Meta(max_length=4000)]
Short = Annotated[str, msgspec.Meta(max_length=400)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^b3:[0-9a-f]{64}$", max_length=67)]
Scalar = bool | Annotated[int, msgspec.Meta(ge=-(1 << 53) + 1, le=(1 << 53) - 1)] | float | Short | None


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Common settings: immutable, no unknown fields."""


class Machine(_Part, frozen=True, kw_only=True):
    """Where it ran, as far as numbers depend on it. Never a host name, a user or a path."""

    cpu: Short
    cores: Count
    memory_nbytes: Count
    system: Short
    accelerator: Short | None = None


class Model(_Part, frozen=True, kw_only=True):
    """Which model ran: its name, and its identity (the object id of `core.identity.ModelIdentity`)."""

    name: Short
    architecture: Short
    dtype: Short
    identity: Digest
    kv_token_nbytes: Count


class Hits(_Part, frozen=True, kw_only=True):
    """What the engine counted, summed over the children of a round.

    `num_wanted_tokens`: those that were to come from the cache; `num_cached_tokens`: those it found there;
    `num_prefilled_tokens`: those it ran through the model before the first sampled token.
    """

    num_prompt_tokens: Count
    num_wanted_tokens: Count
    num_cached_tokens: Count
    num_prefilled_tokens: Count


class Round(_Part, frozen=True, kw_only=True):
    """One measurement. Equal `pair` numbers in two arms were measured next to one another and are compared.

    `values` by name, the unit at the name's end (`_s` seconds, `_nbytes`); `stages_s` are parts of them. `outputs`
    are digests of what came out (token ids, log probabilities), compared between arms.
    """

    pair: Count
    values: Annotated[dict[Name, float], msgspec.Meta(max_length=64)]
    stages_s: Annotated[dict[Name, float], msgspec.Meta(max_length=64)] = {}
    hits: Hits | None = None
    outputs: Annotated[dict[Name, Digest], msgspec.Meta(max_length=16)] = {}


class Arm(_Part, frozen=True, kw_only=True):
    """One way of doing it. `text` says what was timed, from where to where."""

    name: Name
    title: Short
    text: Text
    rounds: Annotated[tuple[Round, ...], msgspec.Meta(min_length=1, max_length=MAX_ROUNDS)]


class Term(_Part, frozen=True, kw_only=True):
    """A value of an arm's rounds, less another value of the same round when `minus` is given."""

    arm: Name
    value: Name
    minus: Name | None = None


class Derived(_Part, frozen=True, kw_only=True):
    """A number computed from the rounds.

    `median` of `over`; low and high are the least and the largest round. `ratio`: geometric mean of over / under of
    paired rounds; low and high are its 95 % interval (Student's t on the logarithms; equal to it for one pair).
    `quotient`: median of over / under of paired rounds, for values that may be zero or negative; low and high as for
    `median`. `num_rounds`: how many rounds or pairs went in.
    """

    name: Name
    text: Short
    unit: Short
    how: Literal["median", "ratio", "quotient"]
    over: Term
    under: Term | None = None
    value: float
    low: float
    high: float
    num_rounds: Annotated[int, msgspec.Meta(ge=1)]


class Check(_Part, frozen=True, kw_only=True):
    """A comparison counted over the rounds.

    `equal-outputs`: rounds of `arm` whose output `output` equals that of the paired round of `reference`.
    `all-hit`: rounds of `arm` in which the engine found every wanted token in its cache. `promised`: it must hold
    (every round checked, all equal); a check that is not promised is information.
    """

    name: Name
    text: Short
    how: Literal["equal-outputs", "all-hit"]
    arm: Name
    reference: Name | None = None
    output: Name | None = None
    promised: bool
    num_checked: Count
    num_equal: Count
    held: bool


class Goal(_Part, frozen=True, kw_only=True):
    """A bound on a derived number. `held`: its interval reaches the bound; `clear`: all of the interval does."""

    name: Name
    text: Short
    derived: Name
    relation: Literal["at-least", "at-most"]
    bound: float
    held: bool
    clear: bool


class Receipt(_Part, frozen=True, kw_only=True, tag_field="type", tag=TYPE):
    """See the module's text. Immutable; `thaw.receipt.make` computes what is computed."""

    kind: Name
    command: Text
    time: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", max_length=20)]
    versions: Annotated[dict[Name, Short], msgspec.Meta(max_length=64)]
    machine: Machine
    model: Model | None
    parameters: Annotated[dict[Name, Scalar], msgspec.Meta(max_length=128)]
    arms: Annotated[tuple[Arm, ...], msgspec.Meta(min_length=1, max_length=MAX_ARMS)]
    derived: Annotated[tuple[Derived, ...], msgspec.Meta(max_length=256)] = ()
    checks: Annotated[tuple[Check, ...], msgspec.Meta(max_length=256)] = ()
    goals: Annotated[tuple[Goal, ...], msgspec.Meta(max_length=64)] = ()
    notes: Annotated[tuple[Text, ...], msgspec.Meta(max_length=64)] = ()
    digest: Digest

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def number(self, name: str) -> Derived | None:
        """The derived number of this name."""
        return next((derived for derived in self.derived if derived.name == name), None)

    @property
    def ok(self) -> bool:
        """Every promised check held and every goal was met, as the receipt says (`verify` says whether that is so)."""
        return all(c.held for c in self.checks if c.promised) and all(g.held for g in self.goals)
