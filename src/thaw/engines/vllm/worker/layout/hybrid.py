"""The caches of a model with recurrent layers, of which vLLM's groups know names and thaw's groups the config.

The config says what the cache groups are, as in every engine, so that they are the same everywhere; here they are
compared with what vLLM has made of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thaw.core.cache import CacheGroup, FullKV, point_groups, token_groups
from thaw.core.errors import Unsupported
from thaw.engines.hf.groups import groups as groups_of
from thaw.engines.hf.recurrent import has_delta_rule
from thaw.engines.vllm.block_tables import BlockTables
from thaw.engines.vllm.worker.layout import make_layout
from thaw.engines.vllm.worker.layout.base import KVLayout
from thaw.engines.vllm.worker.layout.states import StatePages


@dataclass(frozen=True)
class Caches:
    """A worker's: what keeps tokens, each with the number of its block table, the model's cache groups, and what keeps
    states."""

    layouts: tuple[KVLayout, ...]
    groups: tuple[CacheGroup, ...]
    tables: tuple[int, ...]
    states: StatePages | None = None

    def describe(self) -> dict[str, str]:
        """What a person is told about them, as plain strings."""
        return self.layouts[0].describe() | ({} if self.states is None else self.states.describe())


NUMBER = re.compile(r"\blayers\.(\d+)\.")
STATE_NUMBER = re.compile(r"^(?:model\.)?(\d+)\.mixer$")
"""What vLLM calls a state in models whose layers may keep a state and KV both: with a number of its own."""
KV_NUMBER = re.compile(r"\battn\.(\d+)$")
"""What it calls the KV of Zamba2's shared attention: with the number of the use."""


def make_hybrid(
    kv_caches: Mapping[str, Any],
    names: Sequence[Sequence[str]],
    tables: BlockTables,
    config: Mapping[str, Any],
    dtype: str,
) -> Caches:
    """Of vLLM's groups, which are told apart in `tables`; `names[g]` are the layers of group g. Raises `Unsupported`
    where vLLM's caches are not those that the config names."""
    groups = groups_of(config, dtype)
    kv, states = token_groups(groups), point_groups(groups)
    if len(kv) != 1 or len(states) != 1 or not isinstance(kv[0], FullKV) or len(tables.tokens) != 1:
        raise Unsupported(
            f"this model's caches are {'; '.join(map(str, groups)) or 'unknown'}: one group of full attention and one "
            "of states are supported"
        )
    number = layer_numbers(config)
    layout = make_layout({name: kv_caches[name] for name in names[tables.tokens[0]]})
    _require_same(layout, kv[0], tuple(map(number, layout.layer_names)))
    turned = layout.device.type != "cpu" and has_delta_rule(config)
    of_states = [{number(name): kv_caches[name] for name in names[table.group]} for table in tables.states]
    pages = {layer: cache for found in of_states for layer, cache in found.items()}
    return Caches((layout,), groups, (0,), StatePages(states[0], pages, list(map(list, of_states)), turned=turned))


def _require_same(layout: KVLayout, group: FullKV, layers: tuple[int, ...]) -> None:
    found = (layers, layout.num_kv_heads, layout.head_dim, str(layout.dtype)[6:])
    named = (group.layer_numbers, group.num_kv_heads, group.head_dim, group.dtype)
    if found != named or not group.layer_planes == ((2, group.head_dim),):
        raise Unsupported(
            f"vLLM keeps keys and values of (layers, heads, head size, dtype) {found}; the model's config names {named}"
        )


def layer_numbers(config: Mapping[str, Any]) -> Callable[[str], int]:
    """Which of the model's layers a name of vLLM's is of. It asks each name for a number that no other cache has; so
    where a layer may keep a state and KV, states count on from the last layer (Falcon-H1), or from the last use of the
    shared attention, whose KV has the number of the use (Zamba2)."""
    kind, kinds = config.get("model_type"), list(config.get("layers_block_type") or ())
    shared = [layer for layer, what in enumerate(kinds) if what == "hybrid"] if kind == "zamba2" else []
    before = {"zamba2": len(shared), "falcon_h1": config.get("num_hidden_layers")}.get(str(kind))

    def number(name: str) -> int:
        state, use, plain = STATE_NUMBER.search(name), KV_NUMBER.search(name), NUMBER.search(name)
        if state is not None and before is not None:
            return int(state[1]) - before
        if use is not None and int(use[1]) < len(shared):
            return shared[int(use[1])]
        if plain is None:
            raise Unsupported(f"layer {name!r} has no number that thaw knows")
        return int(plain[1])

    return number
