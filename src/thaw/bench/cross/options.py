"""What is asked of a crossing, and what one engine of it answers. Plain values; they travel between processes."""

from __future__ import annotations

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.receipt import Model


class CrossBenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`route`: engines in order; the first one reads the document, each other goes on where the one before stopped.

    `pythons`: by an engine's name, the Python of the environment that has it (others run in this one).
    `dtype`: of all engines; the weights' own without. `engine_options`: by name, what to load it with besides.
    `points`: where log probabilities are compared.
    """

    model: str
    route: tuple[str, ...] = ("transformers", "vllm", "sglang", "transformers")
    pythons: dict[str, str] = {}
    dtype: str = ""
    engine_options: dict[str, dict[str, object]] = {}
    num_tokens: int = 900
    turn_tokens: int = 24
    points: int = 8
    top: int = 20
    seed: int = 7
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if len(self.route) < 2:
            raise InvalidRequest(f"route {self.route}: a crossing needs two engines or more")
        if self.num_tokens < 300 or self.turn_tokens < 1 or self.points < 1:
            raise InvalidRequest("a crossing needs 300 tokens or more, a turn of one or more, and a point or more")


class Leg(msgspec.Struct, frozen=True, kw_only=True):
    """What one process does: engine number `number` of the route takes `main` up, looks, and goes on."""

    number: int
    engine: str
    load: dict[str, object]
    repository: str
    options: CrossBenchOptions
    answer: str = ""


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """How far log probabilities lie apart over all points: the largest and the mean difference of the tokens that both
    list, and at how many points the likeliest token is another."""

    largest: float
    mean: float
    other_first: int


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine found and did. The first of a route has no `giver`.

    `taken` and `given`: digests of the session's blobs, in order, as they lie in the store and as the receiver captures
    them again out of its own memory. What it computes at the points on the giver's KV is compared with what the
    giver saw there (`against_giver`) and with what it computes on KV that it prefilled itself (`against_own`); `noise`
    is the latter, a hit in its own cache, against a prefill of the same tokens for each point.
    """

    engine: str
    version: str
    dtype: str
    model: Model
    giver: str | None
    num_kv: int = 0
    num_cached: int = 0
    nbytes: int = 0
    hydrate_s: float = 0.0
    taken: str = ""
    given: str = ""
    against_giver: Distance | None = None
    against_own: Distance | None = None
    noise: Distance | None = None
    numerics: dict[str, str] = {}
