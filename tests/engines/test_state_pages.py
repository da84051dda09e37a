"""Recurrent states between vLLM's pages and blobs: which block, which bytes, in which order. No vLLM here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from thaw.core.cache import PointState, StatePart  # noqa: E402
from thaw.core.errors import LawBroken, NotKept, Unsupported  # noqa: E402
from thaw.engines.vllm.block_tables import BlockTables, StateTable, of_groups  # noqa: E402
from thaw.engines.vllm.jobs import RECENT_STATES  # noqa: E402
from thaw.engines.vllm.scheduler.records import SchedulerRecord  # noqa: E402
from thaw.engines.vllm.worker.layout.states import StatePages  # noqa: E402
from thaw.engines.vllm.worker.step_loads import StepLoads  # noqa: E402

COLUMNS, BLOCKS, PAGE = 3, 6, 1024
GROUP = PointState(
    name="state", first_layer=0, num_layers=3, layers=(0, 2, 3),
    parts=(
        StatePart(name="conv.q", num_heads=2, shape=(4, COLUMNS), dtype="bfloat16"),
        StatePart(name="conv.v", num_heads=4, shape=(2, COLUMNS), dtype="bfloat16"),
        StatePart(name="recurrent", num_heads=4, shape=(4, 2), dtype="float32"),
    ),
)  # fmt: skip
TABLES = ((0, 3), (2,))
"""Two of vLLM's groups; the layers of the first share no table with those of the second."""


def _pages() -> dict[int, Any]:
    """Padded, as vLLM pads them to the size of its other pages."""
    generator = torch.Generator().manual_seed(0)
    nbytes = GROUP.nbytes // GROUP.num_layers
    whole = {
        layer: torch.randint(-128, 128, (BLOCKS, 1, 1, PAGE), dtype=torch.int8, generator=generator)
        for layer in GROUP.layer_numbers
    }
    return {layer: page[..., :nbytes] for layer, page in whole.items()}


def _blobs() -> tuple[Any, ...]:
    return tuple(
        torch.empty((GROUP.num_layers, *part.shape), dtype=getattr(torch, part.dtype)) for part, _ in GROUP.blobs
    )


def test_a_state_is_read_as_named_parts_and_written_back_bit_for_bit() -> None:
    pages = _pages()
    states, raw, blobs = StatePages(GROUP, pages, TABLES), torch.empty(3, GROUP.nbytes // 3, dtype=torch.int8), _blobs()
    states.read((4, 1), raw)
    states.blobs(raw, blobs)
    for row, (layer, block) in enumerate(((0, 4), (2, 1), (3, 4))):
        page = pages[layer][block, 0, 0].clone()
        conv = page[: 2 * COLUMNS * 16].view(torch.bfloat16).view(COLUMNS, 16).view(torch.int16)
        matrices = page[2 * COLUMNS * 16 :].view(torch.float32).view(4, 4, 2).view(torch.int32)
        for at, (head, channels) in enumerate([(h, 4) for h in range(2)] + [(h, 2) for h in range(4)]):
            first = head * channels if at < 2 else 8 + head * channels
            expected = conv[:, first : first + channels].t()
            assert torch.equal(blobs[at][row].view(torch.int16), expected), (layer, at)
        for head in range(4):
            assert torch.equal(blobs[6 + head][row].view(torch.int32), matrices[head])
    at_once = _blobs()
    states.save((4, 1), at_once)
    for one, two in zip(blobs, at_once, strict=True):
        assert torch.equal(one.view(torch.int16), two.view(torch.int16))
    before = {layer: page.clone() for layer, page in pages.items()}
    states.write(blobs, (5, 2))
    for layer, source, target in ((0, 4, 5), (2, 1, 2), (3, 4, 5)):
        assert torch.equal(pages[layer][target], before[layer][source])
        kept = [block for block in range(BLOCKS) if block != target]
        assert torch.equal(pages[layer][kept], before[layer][kept])


def test_matrices_that_lie_the_other_way_round_are_the_same_blobs() -> None:
    """As a GPU's kernels have those of a delta rule: a state that was read there is written as it was read, and its
    blobs are those of the same matrices on a CPU."""
    pages = _pages()
    states = StatePages(GROUP, pages, TABLES, turned=True)
    raw, blobs = torch.empty(3, GROUP.nbytes // 3, dtype=torch.int8), _blobs()
    states.read((4, 1), raw)
    states.blobs(raw, blobs)
    for row, (layer, block) in enumerate(((0, 4), (2, 1), (3, 4))):
        matrices = pages[layer][block, 0, 0].clone()[2 * COLUMNS * 16 :].view(torch.float32).view(4, 2, 4)
        for head in range(4):
            assert torch.equal(blobs[6 + head][row].view(torch.int32), matrices[head].t().view(torch.int32))
    states.write(blobs, (5, 2))
    for layer, source, target in ((0, 4, 5), (2, 1, 2), (3, 4, 5)):
        assert torch.equal(pages[layer][target], pages[layer][source])
    StatePages(GROUP, pages, TABLES).write(blobs, (3, 3))
    assert not torch.equal(pages[0][3], pages[0][4]), "or the order of the axes shows nothing here"


def test_pages_that_are_not_of_the_configs_parts_are_refused() -> None:
    pages = _pages()
    with pytest.raises(Unsupported, match=r"layer 2: vLLM keeps a state of \[6, 1, 1, 223\] torch.int8"):
        StatePages(GROUP, {**pages, 2: pages[2][..., :-1]}, TABLES)
    with pytest.raises(Unsupported, match=r"vLLM keeps states of layers \[0, 2\]"):
        StatePages(GROUP, pages, ((0,), (2,)))


def test_the_block_of_a_state_is_the_one_of_its_last_token() -> None:
    tables = BlockTables(tokens=(1,), states=(StateTable(0, 256), StateTable(2, 4096)))
    of_request = ((0, 7, 9), (3, 4, 5), (8,))
    assert tables.of_tokens(of_request) == ((3, 4, 5),)
    assert [tables.state_blocks(of_request, n) for n in (257, 512, 513)] == [(7, 8), (7, 8), (9, 8)]
    with pytest.raises(LawBroken, match="no block for the state after 256 tokens"):
        tables.state_blocks(of_request, 256)
    with pytest.raises(LawBroken, match="no block for the state after 769 tokens"):
        tables.state_blocks(of_request, 769)


def test_groups_are_told_apart_by_their_specs() -> None:
    kinds = {
        name: type(name, (), {"block_size": size}) for name, size in (("MambaSpec", 512), ("FullAttentionSpec", 16))
    }
    groups = [SimpleNamespace(kv_cache_spec=kinds[name]()) for name in ("MambaSpec", "FullAttentionSpec", "MambaSpec")]
    assert of_groups(groups) == BlockTables((1,), (StateTable(0, 512), StateTable(2, 512)))


def test_a_record_names_the_states_that_it_has() -> None:
    record = SchedulerRecord([], 0, [], points={5, 40})
    for token in range(100, 120):
        record.stepped(token)
    assert record.states == (5, 40, *range(120 - RECENT_STATES, 120))
    record.require_state(0)
    record.require_state(119)
    with pytest.raises(NotKept, match=r"no state is kept after 41 tokens: .*has states after … 112, 113.*`reread`"):
        record.require_state(41)


def test_what_one_step_began_to_load_is_told_of_together() -> None:
    loads = StepLoads()
    loads.begin(["a", "b", "c"])
    loads.begin(["d"])
    assert loads.end("b", lost=True) == (set(), set()) and loads.end("a") == (set(), set())
    assert loads.end("d") == ({"d"}, set())
    assert loads.end("c") == ({"a", "b", "c"}, {"b"})
    assert loads.end("refused", lost=True) == ({"refused"}, {"refused"})
