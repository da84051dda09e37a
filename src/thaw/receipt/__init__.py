"""Receipts: measured, checkable records of a run. A figure that thaw publishes is a receipt.

`format` says what one is, `make` writes it, `read` takes it from anywhere, `verify` computes every figure again.
"""

from __future__ import annotations

from thaw.receipt.format import Arm, Check, Derived, Goal, Hits, Machine, Model, Receipt, Round, Term
from thaw.receipt.make import all_hit, at_least, at_most, dumps, equal_outputs, make, median, quotient, ratio
from thaw.receipt.read import Source, read
from thaw.receipt.verify import Verified, verify

__all__ = [
    "Arm", "Check", "Derived", "Goal", "Hits", "Machine", "Model", "Receipt", "Round", "Source", "Term", "Verified",
    "all_hit", "at_least", "at_most", "dumps", "equal_outputs", "make", "median", "quotient", "ratio", "read", "verify",
]  # fmt: skip
