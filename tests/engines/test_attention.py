"""Attention over pages: the kernel against the written-out reference, the whole path against the stock model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Engine  # noqa: E402
from thaw.engines.embedded.backend import Feed  # noqa: E402
from thaw.engines.embedded.pages import PAGE, PagedKV  # noqa: E402
from thaw.engines.transformers.attention import partial, reference_partial  # noqa: E402
from thaw.testing.laws.kit import ids  # noqa: E402
from thaw.testing.models import ARCHITECTURES  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = [(1, 1, False), (1, 256, False), (16, 256, False), (300, 77, False), (5, 5, True), (300, 300, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "keys", "causal"), SHAPES)
def test_the_kernel_computes_what_the_reference_says(dtype: torch.dtype, rows: int, keys: int, causal: bool) -> None:
    q, k, v = (draw(2, 3, n, 64, dtype=dtype, seed=i) for i, n in enumerate((rows, keys, keys)))
    out, lse = partial(q, k, v, 0.125, causal=causal)
    expected, expected_lse = reference_partial(q, k, v, 0.125, causal=causal)
    assert out.shape == q.shape and lse.shape == (2, 3, rows)
    assert (out.float() - expected.float()).abs().max() < TOLERANCE[dtype]
    assert (lse - expected_lse).abs().max() < 2e-2


def test_the_reference_is_softmax_attention() -> None:
    q, k, v = (draw(1, 2, n, 8, seed=i) for i, n in enumerate((4, 9, 9)))
    out, lse = reference_partial(q, k, v, 0.3, causal=False)
    scores = q @ k.transpose(-1, -2) * 0.3
    assert torch.allclose(out, torch.softmax(scores, -1) @ v, atol=1e-6)
    assert torch.allclose(lse, torch.logsumexp(scores, -1), atol=1e-6)


@pytest.mark.parametrize("cuts", [(0, 100), (0, 1, 100), (0, 30, 31, 77, 100)])
def test_partials_merge_to_the_whole(cuts: Sequence[int]) -> None:
    q, k, v = (draw(1, 2, n, 16, seed=i) for i, n in enumerate((3, 100, 100)))
    whole, whole_lse = reference_partial(q, k, v, 0.25, causal=False)
    parts = [partial(q, k[:, :, a:b], v[:, :, a:b], 0.25, causal=False) for a, b in itertools.pairwise(cuts)]
    lses = torch.stack([lse for _, lse in parts])
    merged = (torch.softmax(lses, 0).unsqueeze(-1) * torch.stack([out for out, _ in parts])).sum(0)
    assert torch.allclose(merged, whole, atol=1e-5)
    assert torch.allclose(torch.logsumexp(lses, 0), whole_lse, atol=1e-5)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[tuple[Engine, torch.Tensor]]:
    """An engine, and the log probabilities that the stock model gives after each of 600 tokens."""
    folder = tiny_model(request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids(600)])).logits[0].double(), -1)
    with load_engine("transformers", model=str(folder)) as engine:
        yield engine, expected


@pytest.mark.parametrize(
    "pieces", [(600,), (255, 1, 1, 1, 17, 300, 25), (7,) * 50 + (250,)], ids=["once", "mixed", "short"]
)
def test_the_paged_path_equals_the_stock_model(both: tuple[Engine, torch.Tensor], pieces: Sequence[int]) -> None:
    """However the tokens are fed: one by one, in short runs, in long ones, across page borders."""
    engine, expected = both
    backend = engine._backend  # type: ignore[attr-defined]
    kv, end = PagedKV(backend), 0
    for piece in pieces:
        kv.reserve(end + piece)
        row = backend.forward([Feed(kv, ids(600)[end : end + piece])])
        end += piece
        ours = torch.log_softmax(backend.logits(row)[0].double(), -1)
        assert (ours - expected[end - 1]).abs().max() < 1e-4, f"after {end} tokens"
    assert end == 600


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def backend(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[Any]:
    with load_engine("transformers", model=str(tiny_model("gpt_neox", dtype=request.param))) as engine:
        yield engine._backend  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("n", [2, 5, 24])
def test_a_rows_bits_do_not_depend_on_who_shares_its_pages(backend: Any, count: int, n: int) -> None:
    """The same batch of n, once over one prefix and once over n copies of it."""
    parent = _prefilled(backend, 600)
    shared = [parent.fork(600) for _ in range(n)]
    copies = [_copied(backend, parent) for _ in range(n)]
    assert all(a.runs[0].extent is parent.runs[0].extent for a in shared)
    assert all(b.runs[0].extent is not parent.runs[0].extent for b in copies)
    news = [ids(count, i + 1) for i in range(n)]
    rows = []
    for family in (shared, copies):
        for kv in family:
            kv.reserve(600 + count)
        rows.append(torch.stack(backend.forward([Feed(kv, new) for kv, new in zip(family, news, strict=True)])))
    assert torch.equal(rows[0], rows[1])


def test_a_rows_bits_do_not_depend_on_how_pages_lie_in_memory(backend: Any) -> None:
    """Eight pages in one extent, in eight, and as they grew."""
    grown = PagedKV(backend)
    for end in range(100, 1801, 100):
        grown.reserve(end)
        backend.forward([Feed(grown, ids(1800)[end - 100 : end])])
    together, apart = _copied(backend, grown), _copied(backend, grown, one_by_one=True)
    assert len(together.runs) < len(grown.runs) < len(apart.runs) == 8
    rows = []
    for kv in (grown, together, apart):
        kv.reserve(1801)
        rows.append(backend.forward([Feed(kv, [5])])[0])
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def _prefilled(backend: Any, count: int) -> PagedKV:
    kv = PagedKV(backend)
    kv.reserve(count)
    backend.forward([Feed(kv, ids(count))])
    return kv


def _copied(backend: Any, source: PagedKV, *, one_by_one: bool = False) -> PagedKV:
    """The same bytes in memory of its own: in one extent, or one a page."""
    from thaw.core.prefix import windows
    from thaw.engines.embedded.pages import PageRange

    kv = PagedKV(backend)
    if one_by_one:
        pages = -(-source.num_tokens // PAGE)
        kv.runs = [PageRange(kv.factory.extent(1), 0, i, 1) for i in range(pages)]
    kv.reserve(source.num_tokens)
    for start, stop in windows(0, source.num_tokens):
        for head in range(kv.factory.groups[0].num_blobs):
            kv.write(head, start, stop, source.read(head, start, stop), stop - start)
    kv.num_tokens = source.num_tokens
    return kv
