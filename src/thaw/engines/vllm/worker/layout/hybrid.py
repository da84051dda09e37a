"""The caches of a model with recurrent layers, of which vLLM's groups know names and thaw's groups the config.

The config says what the cache groups are, as in every engine, so that they are the same everywhere; here they are
compared with what vLLM has made of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thaw.core.cache import CacheGroup, FullKV, PointState, point_groups, token_groups
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
    attends = names[tables.tokens[0]]
    layout = make_layout({name: kv_caches[name] for name in attends})
    _require_same(layout, kv[0], attends)
    turned = layout.device.type != "cpu" and has_delta_rule(config)
    pages = _state_pages(kv_caches, [names[table.group] for table in tables.states], states[0], turned=turned)
    return Caches((layout,), groups, (0,), pages)


def _state_pages(
    kv_caches: Mapping[str, Any], tables: Sequence[Sequence[str]], group: PointState, *, turned: bool
) -> StatePages:
    pages = {_number(name): kv_caches[name] for names in tables for name in names}
    return StatePages(group, pages, [[_number(name) for name in names] for names in tables], turned=turned)


def _require_same(layout: KVLayout, group: FullKV, names: Sequence[str]) -> None:
    found = (tuple(sorted(map(_number, names))), layout.num_kv_heads, layout.head_dim, str(layout.dtype)[6:])
    named = (group.layer_numbers, group.num_kv_heads, group.head_dim, group.dtype)
    if found != named or not group.layer_planes == ((2, group.head_dim),):
        raise Unsupported(
            f"vLLM keeps keys and values of (layers, heads, head size, dtype) {found}; the model's config names {named}"
        )


def _number(name: str) -> int:
    found = NUMBER.search(name)
    if found is None:
        raise Unsupported(f"layer {name!r} has no number that thaw knows")
    return int(found[1])
