"""The conformance suite: an engine that passes it keeps thaw's laws.

    from thaw.testing import EngineTests

    class TestMyEngine(EngineTests):
        @pytest.fixture(scope="class")
        @classmethod
        def engine_factory(cls):
            return lambda **changes: load_engine("mine", **changes)

`engine_factory(**changes)` boots an engine of one fixed model and must take `policy=` and `max_model_len=`. Engines
that it returns for equal changes stand for two processes that run one model, so they must be equal in every bit.
To have the guard of the weights tested too, set `changes_weights = True` and give `change_weights` and `guard_off`.
A run boots six engines at most (four without the guard); a slow engine may lower the sizes at `EngineKit`. What an
engine does not have by `info.capabilities` is asked of it in the form that is left.

The suite needs no repository and no model of size; what it asks of the model is that it *looks* at its KV
(`thaw.testing.models` makes such), which the negative control in it proves.
"""

from __future__ import annotations

from thaw.testing.laws.boundary_law import BoundaryLaw
from thaw.testing.laws.bytes_law import BytesLaw
from thaw.testing.laws.closed_law import ClosedLaw
from thaw.testing.laws.fork_law import ForkLaw
from thaw.testing.laws.groups_law import GroupsLaw
from thaw.testing.laws.proof_law import ProofLaw
from thaw.testing.laws.session_law import SessionLaw
from thaw.testing.laws.text_law import TextLaw


class ExactnessTests(BytesLaw, BoundaryLaw, ForkLaw):
    """The laws of bytes, boundary and forks alone: what differs from model to model."""


class EngineTests(ExactnessTests, GroupsLaw, ClosedLaw, ProofLaw, SessionLaw, TextLaw):
    """The whole law book."""
