"""Weights in the store: models and adapters as content-addressed tensors in the packs that hold KV.

    repo.weights.add("~/models/Qwen3-0.6B")       a set: every tensor once, however many sets have it
    thaw run --model thaw:Qwen3-0.6B              loads from packs; every tensor is verified while it streams

A set is known by the weights id that identities carry: a commit names the weights that it continues with. What a set is
on disk: `record`; what is in its manifest: `thaw.engines.hf.stored`. torch is imported by `tensors`, `roots` and the
loaders of engines alone.
"""

from __future__ import annotations

from thaw.weights.adding import AddedWeights
from thaw.weights.book import ShownWeights, WeightsBook
from thaw.weights.record import WeightsEntry

__all__ = ["AddedWeights", "ShownWeights", "WeightsBook", "WeightsEntry"]
