"""One session a forward pass, through the stock model with its own attention: for models that `packed.py` is not for.

The model sees a cache of its own kind whose layers read a session's pages and write the new tokens there, so the
numbers are those of the stock model with a `DynamicCache`, bit for bit, for the same feeds. Sessions of a batch run one
after the other: no session's bits depend on another.

Shape letters as in kv.py; S is the keys that a layer attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import zip_longest
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from thaw.core.cache import CacheGroup
from thaw.core.errors import Unsupported
from thaw.engines.embedded.backend import Feed
from thaw.engines.embedded.pages import PAGE, PagedKV
from thaw.engines.hf.groups import KV, Kept, Latent, Spec, States, places
from thaw.engines.hf.recurrent import at_dtype
from thaw.engines.transformers.kv import TorchExtent
from thaw.engines.transformers.states import AllStates, StateLayer, expected_of, found_in

NoLayer = getattr(cache_utils, "DummyLayer", DynamicLayer)
"""A layer that keeps nothing: older transformers have no class for it."""
Place = tuple[int, int, Spec]
"""Of what a layer keeps: its group's number, the layer's row in the group, what it is."""


class PagedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values of a session, all of them: gathered from its pages when the layer runs."""

    def __init__(self, kv: PagedKV, group: int, row: int, spec: Spec) -> None:
        CacheLayerMixin.__init__(self)
        self._kv, self._group, self._row, self._spec = kv, group, row, spec
        self._repeats = spec.repeats if isinstance(spec, KV) else 1
        self.cumulative_length = kv.num_tokens

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def update(
        self, key_1HND: torch.Tensor, value_1HND: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens, and return all [1, H, S, D] that they attend to."""
        start, count = self.cumulative_length, key_1HND.shape[2]
        self.cumulative_length += count
        new = (key_1HND[0, :: self._repeats], value_1HND[0, :: self._repeats])
        self._write(start, new)
        begin = self._begin(start)
        shapes = [(t.shape[0], start + count - begin, t.shape[2]) for t in new]
        found = [torch.empty(shape, dtype=t.dtype, device=t.device) for shape, t in zip(shapes, new, strict=True)]
        for out, mine in zip(found, new, strict=True):
            out[:, start - begin :] = mine
        self._read(begin, start, found)
        keys, values = (out.repeat_interleave(self._repeats, 0) if self._repeats > 1 else out for out in found)
        return keys[None], values[None]

    def _begin(self, start: int) -> int:
        """The first token that the token at `start` attends to."""
        return 0

    def _write(self, start: int, new: Sequence[torch.Tensor]) -> None:
        end = start + new[0].shape[1]
        for page in range(start // PAGE, -(-end // PAGE)):
            extent, index = self._kv.locate(page)
            a, b = max(start, page * PAGE), min(end, (page + 1) * PAGE)
            for slots, rows in zip(self._views(extent, slice(index, index + 1)), new, strict=True):
                slots[:, 0, a - page * PAGE : b - page * PAGE] = rows[:, a - start : b - start]

    def _read(self, begin: int, end: int, into: Sequence[torch.Tensor]) -> None:
        """Tokens [begin, end) to the first rows of `into`: whole pages of a run at once."""
        for run in self._kv.runs:
            first, stop = max(begin, run.start * PAGE), min(end, (run.start + run.count) * PAGE)
            for a, b in _spans(first, stop):
                at = run.first + a // PAGE - run.start
                pages = slice(at, at + -(-(b - a) // PAGE))
                for slots, out in zip(self._views(run.extent, pages), into, strict=True):
                    target = out[:, a - begin : b - begin]
                    if (b - a) % PAGE or a % PAGE:
                        target[:] = slots[:, 0, a % PAGE : a % PAGE + b - a]
                    else:
                        target.view(slots.shape).copy_(slots)

    def _views(self, extent: Any, pages: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values in pages of an extent, [H, P, T, D] each."""
        assert isinstance(extent, TorchExtent)
        planes = extent.planes(self._group, pages)
        one = planes[0][:, :, self._row]
        if isinstance(self._spec, Latent):
            return one[:, :, 0, :, : self._spec.rank], one[:, :, 0, :, self._spec.rank :]
        return one[:, :, 0], (one[:, :, 1] if len(planes) == 1 else planes[1][:, :, self._row, 0])


class WindowLayer(PagedLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The same of the last `window` - 1 tokens before the new ones."""

    def __init__(self, kv: PagedKV, group: int, row: int, spec: KV) -> None:
        assert spec.window is not None
        DynamicSlidingWindowLayer.__init__(self, sliding_window=spec.window)
        PagedLayer.__init__(self, kv, group, row, spec)

    def _begin(self, start: int) -> int:
        window: int = self.sliding_window
        return max(0, start - window + 1)


def _spans(begin: int, end: int) -> list[tuple[int, int]]:
    """[begin, end) as what lies in a first page in part, whole pages, and what lies in a last page in part."""
    if begin >= end:
        return []
    inner, outer = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
    if inner > outer:
        return [(begin, end)]
    return [(a, b) for a, b in ((begin, inner), (inner, outer), (outer, end)) if a < b]


class SessionCache(Cache):  # type: ignore[misc]
    """What the stock model gets as its cache: a layer for each of its own."""

    def __init__(self, kv: PagedKV, kept: Sequence[Sequence[Place]]) -> None:
        super().__init__(layers=[_layer(kv, of_layer) for of_layer in kept])


class PagedStateLayer(StateLayer, PagedLayer):
    """A layer that attends and is recurrent."""

    is_compileable = False

    def __init__(self, kv: PagedKV, group: int, row: int, spec: Spec) -> None:
        StateLayer.__init__(self)
        PagedLayer.__init__(self, kv, group, row, spec)


def _layer(kv: PagedKV, of_layer: Sequence[Place]) -> Any:
    tokens = [place for place in of_layer if not isinstance(place[2], States)]
    if not tokens:
        return StateLayer() if of_layer else NoLayer()
    (place,) = tokens
    spec = place[2]
    if len(of_layer) > 1:
        return PagedStateLayer(kv, *place)
    if isinstance(spec, KV) and spec.window is not None:
        return WindowLayer(kv, place[0], place[1], spec)
    return PagedLayer(kv, *place)


def takes_positions(module: Any) -> bool:
    """Whether a class is to be told where tokens stand: some count from 0 if not, whatever their cache holds."""
    return "position_ids" in signature(module.forward).parameters


def positions(start: int, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The argument that says it of `count` tokens."""
    return {"position_ids": torch.arange(start, start + count, device=device)[None]}


class Single:
    """Runs feeds one by one through `body`, a stock model without its head."""

    def __init__(self, body: Any, kept: Sequence[Kept], groups: Sequence[CacheGroup], device: torch.device) -> None:
        self._body, self._device = body, device
        self._places = places(kept)
        self._states = AllStates(groups, device)
        self._takes_positions = takes_positions(body)
        self._more = {"logits_to_keep": 1} if "logits_to_keep" in signature(body.forward).parameters else {}

    def forward(self, feeds: Sequence[Feed]) -> list[torch.Tensor]:
        """The last hidden state of each feed; advances `kv.num_tokens`."""
        return [self._run(feed) for feed in feeds]

    def _run(self, feed: Feed) -> torch.Tensor:
        cache, start = SessionCache(feed.kv, self._places), feed.kv.num_tokens
        self._states.fill(cache.layers, feed.kv)
        out = self._body(
            input_ids=torch.tensor([list(feed.tokens)], device=self._device),
            past_key_values=cache,
            use_cache=True,
            **(positions(start, len(feed.tokens), self._device) if self._takes_positions else {}),
            **self._more,
        )
        feed.kv.num_tokens += len(feed.tokens)
        self._states.keep(cache.layers, feed.kv)
        row: torch.Tensor = out.last_hidden_state[0, -1].clone()
        return row


KNOWN = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer)
"""Layers of the stock cache that keep keys and values."""


def check(name: str, stock: Cache, kept: Sequence[Kept], num_tokens: int, dtype: str) -> None:
    """Raise `Unsupported` unless the stock model's own cache after `num_tokens` tokens, fewer than any window, has
    what the config was read to say: shapes of keys and values, and windows, layer by layer."""
    found = [_found(layer, num_tokens) for layer in stock.layers]
    expected = [_expected(specs, dtype) for specs in kept]
    for number, (theirs, ours) in enumerate(zip_longest(found, expected)):
        if theirs != ours:
            raise Unsupported(
                f"{name}: layer {number} keeps {theirs}, and its config was read as {ours} (KV heads, sizes of K and "
                "V, window; shapes and dtypes of states): thaw does not know this kind of cache"
            )


def _found(layer: Any, num_tokens: int) -> Any:
    if isinstance(layer, LinearAttentionLayer):
        return _found_tokens(layer, num_tokens), found_in(layer)
    return _found_tokens(layer, num_tokens)


def _found_tokens(layer: Any, num_tokens: int) -> tuple[int, int, int, int | None] | None:
    if getattr(layer, "keys", None) is None:
        return None
    keys, values = layer.keys, layer.values
    if type(layer) not in KNOWN or keys.shape[2] != num_tokens:
        raise Unsupported(f"a layer of {type(layer).__name__}, which thaw does not know")
    return keys.shape[1], keys.shape[3], values.shape[3], getattr(layer, "sliding_window", None)


def _expected(specs: Kept, dtype: str) -> Any:
    states = [spec for spec in specs if isinstance(spec, States)]
    tokens = _expected_tokens([spec for spec in specs if not isinstance(spec, States)])
    return (tokens, expected_of(at_dtype(states[0].parts, dtype))) if states else tokens


def _expected_tokens(specs: Sequence[Spec]) -> tuple[int, int, int, int | None] | None:
    if not specs:
        return None
    (spec,) = specs
    if isinstance(spec, Latent):
        return 1, spec.rank, spec.rope, None
    assert isinstance(spec, KV), spec
    return spec.heads * spec.repeats, spec.dim, spec.dim if spec.value_dim is None else spec.value_dim, spec.window
