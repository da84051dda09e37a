"""KV between paged caches and canonical tensors: bit for bit, and nothing beside the tokens asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from thaw.core.cache import LatentKV  # noqa: E402
from thaw.core.errors import Unsupported  # noqa: E402
from thaw.engines.vllm.worker.layout import cache_groups, make_latent_layout, make_layout, make_layouts, strided  # noqa: E402
from thaw.engines.vllm.worker.layout.base import BITS, KVLayout, layer_order, spans  # noqa: E402
from thaw.engines.vllm.worker.layout.strided import LatentPages, TorchPages  # noqa: E402

BLOCKS = 9
DTYPES = ("bfloat16", "float16", "float32")
STRIDES = ("NHD", "HND", "one buffer")


def random_bits(shape: Sequence[int], dtype: str, seed: int = 0) -> torch.Tensor:
    """Numbers of random bits: infinities, denormals and NaNs of every payload among them."""
    kind = getattr(torch, dtype)
    info = torch.iinfo(BITS[kind])
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(info.min, info.max + 1, tuple(shape), dtype=torch.int64, generator=generator)
    return numbers.to(BITS[kind]).view(kind)


def bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(BITS[numbers.dtype])


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(bits(one), bits(other))


def strided_caches(
    strides: str, *, layers: int = 3, heads: int = 2, block_size: int = 4, head_dim: int = 8, dtype: str = "bfloat16"
) -> dict[str, torch.Tensor]:
    """Caches [B, H, N, 2D] of random bits, as an accelerator's backend lays them out; layer 0 is not named first."""
    shape = (layers, BLOCKS, heads, block_size, 2 * head_dim)
    if strides == "HND":
        tensors = [random_bits(shape[1:], dtype, layer) for layer in range(layers)]
    elif strides == "NHD":
        moved = (BLOCKS, block_size, heads, 2 * head_dim)
        tensors = [random_bits(moved, dtype, layer).transpose(1, 2) for layer in range(layers)]
    else:
        tensors = list(random_bits((BLOCKS, layers, *shape[2:]), dtype).unbind(1))
    return {f"model.layers.{layer}.attn": tensors[layer] for layer in reversed(range(layers))}


def canonical(caches: dict[str, torch.Tensor], block_ids: Sequence[int], start: int, stop: int) -> torch.Tensor:
    """Tokens [start, stop) of plain pages as [H, L, 2, T, D], one number after another's address: slow and plain."""
    names = layer_order(caches)
    _, heads, block_size, width = caches[names[0]].shape
    out = torch.empty(heads, len(names), 2, stop - start, width // 2, dtype=caches[names[0]].dtype)
    for layer, name in enumerate(names):
        for p in range(start, stop):
            row = caches[name][block_ids[p // block_size], :, p % block_size]
            out[:, layer, 0, p - start], out[:, layer, 1, p - start] = row.chunk(2, dim=-1)
    return out


def blank(layout: KVLayout, tokens: int) -> torch.Tensor:
    shape = (layout.num_kv_heads, layout.num_layers, 2, tokens, layout.head_dim)
    return torch.zeros(shape, dtype=layout.dtype)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_is_the_definition(strides: str, dtype: str) -> None:
    caches = strided_caches(strides, dtype=dtype)
    out = blank(layout := TorchPages(caches), 13)
    layout.gather([7, 2, 5, 0], 2, 15, out)
    assert equal(out, canonical(caches, [7, 2, 5, 0], 2, 15))


@pytest.mark.parametrize("strides", STRIDES)
@given(data=st.data(), block_size=st.sampled_from([1, 2, 3, 4, 16]), staging=st.sampled_from([1, 3000, 1 << 20]))
def test_scatter_is_the_inverse_and_touches_nothing_else(
    strides: str, data: st.DataObject, block_size: int, staging: int
) -> None:
    caches = strided_caches(strides, block_size=block_size)
    table = data.draw(st.permutations(range(BLOCKS)).map(lambda ids: ids[:6]))
    start = data.draw(st.integers(0, 6 * block_size))
    stop = data.draw(st.integers(start, 6 * block_size))
    layout = TorchPages(caches, staging=staging)
    source = random_bits(blank(layout, stop - start).shape, "bfloat16", seed=99)
    before = {name: cache.clone() for name, cache in caches.items()}

    layout.scatter(table, start, stop, source)

    out = blank(layout, stop - start)
    layout.gather(table, start, stop, out)
    assert equal(out, source) and equal(out, canonical(caches, table, start, stop))
    layout.scatter(table, start, stop, canonical(before, table, start, stop))
    assert all(equal(caches[name], before[name]) for name in caches)


@given(start=st.integers(0, 40), tokens=st.integers(0, 40), block_size=st.integers(1, 9), limit=st.integers(1, 4))
def test_spans_are_every_token_once_in_order(start: int, tokens: int, block_size: int, limit: int) -> None:
    found = []
    for span in spans(start, start + tokens, block_size, limit):
        assert span.tokens.start == len(found) and span.count <= limit
        assert span.count == 1 or (span.lo, span.hi) == (0, block_size)
        for block in range(span.first, span.first + span.count):
            found += [block * block_size + slot for slot in range(span.lo, span.hi)]
        assert span.tokens.stop == len(found)
    assert found == list(range(start, start + tokens))


def test_host_tensors_may_be_views_of_any_strides() -> None:
    layout = TorchPages(caches := strided_caches("NHD"))
    expected = canonical(caches, [3, 1, 4], 1, 11)
    wide = torch.zeros(4, 3, 2, 30, 8, dtype=torch.bfloat16)
    layout.gather([3, 1, 4], 1, 11, wide[1:3, :, :, 5:15])
    assert equal(wide[1:3, :, :, 5:15].contiguous(), expected)
    assert wide.view(torch.int16).count_nonzero() == expected.view(torch.int16).count_nonzero()
    turned = torch.zeros(10, 8, 2, 3, 2, dtype=torch.bfloat16).permute(4, 3, 2, 0, 1)
    layout.gather([3, 1, 4], 1, 11, turned)
    assert equal(turned.contiguous(), expected)
    layout.scatter([0, 6, 8], 1, 11, turned)
    assert equal(canonical(caches, [0, 6, 8], 1, 11), expected)


def test_a_head_of_the_host_tensor_is_the_kv_of_that_head_alone() -> None:
    layout = TorchPages(caches := strided_caches("HND"))
    out = blank(layout, 12)
    layout.gather([1, 2, 3], 0, 12, out)
    for head in range(2):
        alone = {name: cache[:, head : head + 1].expand(-1, 2, -1, -1) for name, cache in caches.items()}
        assert equal(out[head], canonical(alone, [1, 2, 3], 0, 12)[0])


@pytest.mark.parametrize("strides", STRIDES)
def test_copied_blocks_are_whole_pages_read_before_any_is_written(strides: str) -> None:
    caches = strided_caches(strides)
    before = {name: cache.clone() for name, cache in caches.items()}
    TorchPages(caches).copy_blocks([(1, 2), (2, 1), (3, 8)])
    for name, cache in caches.items():
        assert equal(cache, before[name][[0, 2, 1, 3, 4, 5, 6, 7, 3]])
    TorchPages(caches).copy_blocks([])


def test_a_block_id_out_of_range_never_reaches_memory() -> None:
    layout = TorchPages(strided_caches("NHD"))
    for wrong in (-1, BLOCKS):
        with pytest.raises(IndexError):
            layout.scatter([0, wrong], 0, 8, blank(layout, 8))
        with pytest.raises(IndexError):
            layout.copy_blocks([(0, wrong)])


def test_layers_are_ordered_by_number_not_by_mapping() -> None:
    names = {f"model.layers.{layer}.self_attn.attn": None for layer in (10, 2, 0, 11, 1)}
    assert [name.split(".")[2] for name in layer_order(names)] == ["0", "1", "2", "10", "11"]
    for bad in (["attn"], ["a.1.attn", "b.1.attn"]):
        with pytest.raises(Unsupported, match="order of the KV caches"):
            layer_order(dict.fromkeys(bad))


def test_what_a_person_is_told_is_plain_text() -> None:
    told = TorchPages(strided_caches("NHD")).describe()
    assert all(isinstance(value, str) for value in told.values())
    assert told["shape"] == "[9, 2, 4, 16]" and told["strides"] == "[128, 16, 32, 1]" and told["dtype"] == "bfloat16"
    assert (told["kind"], told["isa"]) == ("torch-pages", "none")


def cache(*shape: int, dtype: str = "bfloat16") -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype))


@pytest.mark.parametrize(
    ("caches", "named"),
    [
        ([], "no KV cache"),
        ([[cache(4, 4), cache(4, 4)]], "mamba"),
        ([cache(4, 2, 16, 128, dtype="uint8")], "quantized"),
        ([cache(4, 2, 16, 128, dtype="float8_e4m3fn")], "quantized"),
        ([cache(4, 16, 576)], "MLA"),
        ([cache(4, 1, 16, 576)], "MLA"),
        ([cache(2, 4, 16, 8, 64)], "another attention"),
        ([cache(4, 2, 16, 128), cache(4, 4, 16, 128)], "mixed"),
        ([cache(4, 2, 16, 128), cache(4, 2, 16, 128, dtype="float16")], "mixed"),
        ([shared := cache(4, 2, 16, 128), shared], "share one cache"),
        ([cache(4, 2, 16, 128).to("meta")], "device 'meta'"),
    ],
)
def test_what_is_not_full_attention_of_one_shape_is_refused_by_name(caches: list[Any], named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        make_layout({f"layers.{layer}": tensor for layer, tensor in enumerate(caches)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("pin", "short_run"), [(True, 0), (True, 1 << 30), (False, 0)])
@pytest.mark.parametrize("staging", [1 << 12, 1 << 20])
def test_an_accelerator_does_as_the_host_does(
    strides: str, pin: bool, short_run: int, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial blocks, several parts, dense and strided host memory, staged on the host or not; all caches come out
    equal."""
    monkeypatch.setattr(strided, "SHORT_RUN", short_run)
    host = strided_caches(strides, layers=5)
    device = {name: torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device="cuda") for name, c in host.items()}
    if strides == "one buffer":
        device = dict(zip(host, random_bits((BLOCKS, 5, 2, 4, 16), "bfloat16").cuda().unbind(1), strict=True))
    for name in host:
        device[name].copy_(host[name])
    from thaw.engines.vllm.worker.layout.strided_triton import TritonPages

    assert type(make_layout(device)) is TritonPages
    here = TorchPages(host)
    for there in (TorchPages(device, staging=staging), TritonPages(device, staging=staging)):
        compare(host, device, here, there, pin)


def compare(
    host: dict[str, torch.Tensor], device: dict[str, torch.Tensor], here: KVLayout, there: KVLayout, pin: bool
) -> None:
    table = [5, 0, 8, 2, 7]
    for start, stop in ((0, 20), (3, 17), (4, 8), (5, 7)):
        expected = canonical(host, table, start, stop)
        wide = torch.zeros(2, 5, 2, 24, 8, dtype=torch.bfloat16, pin_memory=pin)
        outs = wide[:, :, :, : stop - start], torch.zeros(expected.shape, dtype=wide.dtype, pin_memory=pin)
        for out in outs:
            there.gather(table, start, stop, out)
            assert equal(out.contiguous(), expected)
        if hasattr(there, "gather_now"):
            for out in outs:
                out.zero_()
                assert there.gather_now(table, start, stop, out) is pin
                torch.cuda.synchronize()
                assert not pin or equal(out.contiguous(), expected)
        wide.copy_(random_bits(wide.shape, "bfloat16", seed=stop))
        part = wide[:, :, :, 2 : 2 + stop - start]
        for layout in (here, there):
            layout.scatter(table, start, stop, part)
            layout.copy_blocks([(0, 1), (8, 3)])
        assert all(equal(device[name].cpu(), host[name]) for name in host)
        if hasattr(there, "scatter_now"):
            part.copy_(random_bits(part.shape, "bfloat16", seed=stop + 100))
            here.scatter(table, start, stop, part)
            if not there.scatter_now(table, start, stop, part):
                assert not pin
                there.scatter(table, start, stop, part)
            torch.cuda.synchronize()
            assert all(equal(device[name].cpu(), host[name]) for name in host)


# --- latents


def latent_caches(width: int = 12, block_size: int = 4, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """Caches [B, 1, N, W] of random bits, layer 0 not named first."""
    return {f"model.layers.{n}.attn": random_bits((BLOCKS, 1, block_size, width), dtype, n) for n in (2, 0, 1)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_halved", [0, 8])
def test_a_latent_is_one_plane_and_its_roped_part_goes_from_pairs_to_halves(dtype: str, num_halved: int) -> None:
    caches, table, (start, stop) = latent_caches(dtype=dtype), [7, 2, 5, 0], (2, 15)
    layout = make_latent_layout(caches, num_halved)
    out = torch.zeros(1, 3, 1, stop - start, 12, dtype=getattr(torch, dtype))
    layout.gather(table, start, stop, out)
    order = [0, 1, 2, 3, 4, 6, 8, 10, 5, 7, 9, 11] if num_halved else list(range(12))
    for layer, name in enumerate(layout.layer_names):
        for p in range(start, stop):
            assert equal(out[0, layer, 0, p - start], caches[name][table[p // 4], 0, p % 4][order])


@given(data=st.data(), block_size=st.sampled_from([1, 3, 4, 16]), staging=st.sampled_from([1, 3000, 1 << 20]))
def test_scatter_of_latents_is_the_inverse_and_touches_nothing_else(
    data: st.DataObject, block_size: int, staging: int
) -> None:
    caches = latent_caches(block_size=block_size)
    table = data.draw(st.permutations(range(BLOCKS)).map(lambda ids: ids[:6]))
    start = data.draw(st.integers(0, 6 * block_size))
    stop = data.draw(st.integers(start, 6 * block_size))
    layout = LatentPages(caches, num_halved=8, staging=staging)
    before = {name: cache.clone() for name, cache in caches.items()}
    old, out = (torch.zeros(1, 3, 1, stop - start, 12, dtype=torch.bfloat16) for _ in range(2))
    layout.gather(table, start, stop, old)
    source = random_bits(out.shape, "bfloat16", seed=99)
    kept = source.clone()
    layout.scatter(table, start, stop, source)
    layout.gather(table, start, stop, out)
    assert equal(out, source) and equal(source, kept)
    layout.scatter(table, start, stop, old)
    assert all(equal(caches[name], before[name]) for name in caches)


def test_groups_of_latents_are_told_by_their_spec() -> None:
    class MLAAttentionSpec:
        """As vLLM calls it."""

    caches = latent_caches()
    of_v3 = {"model_type": "deepseek_v3", "qk_rope_head_dim": 8}
    layouts = make_layouts(caches, [list(caches)], [MLAAttentionSpec()], of_v3)
    (group,) = cache_groups(layouts, 4)
    assert group == LatentKV(name="latent", first_layer=0, num_layers=3, width=12, dtype="bfloat16")
    with pytest.raises(Unsupported, match="type kimi_linear"):
        make_layouts(caches, [list(caches)], [MLAAttentionSpec()], {"model_type": "kimi_linear"})
    with pytest.raises(Unsupported, match=r"its shape is \[9, 4, 12\]"):
        make_latent_layout({name: one.squeeze(1) for name, one in caches.items()})
    with pytest.raises(Unsupported, match="quantized"):
        make_latent_layout({"layers.0": cache(4, 1, 16, 656, dtype="uint8")})


class TestPackedPages:
    """Against vLLM's own op. The folder's name is no proof that vLLM is there, so one of its modules is asked for."""

    @pytest.fixture(autouse=True)
    def _op(self) -> None:
        pytest.importorskip("vllm._custom_ops")
        if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
            pytest.skip("this build of vLLM has no CPU attention")

    @staticmethod
    def caches(block_size: int, head_dim: int, dtype: str) -> dict[str, torch.Tensor]:
        """Two layers of 3 heads in one buffer, of random bits."""
        whole = random_bits((2, BLOCKS, 3, block_size, 2 * head_dim), dtype)
        return {f"layers.{layer}.attn": whole[layer] for layer in (1, 0)}

    @staticmethod
    def write(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, isa: str) -> None:
        """What the backend does with new tokens: `rows` [2, T, H, D] into slots of one layer."""
        from vllm import _custom_ops

        blocks, heads, block_size, width = cache.shape
        key_cache, value_cache = cache.view(blocks, heads, 2 * block_size, width // 2).chunk(2, dim=2)
        _custom_ops.cpu_attn_reshape_and_cache(rows[0], rows[1], key_cache, value_cache, slots, isa)

    @pytest.mark.parametrize("isa", [None, "vec", "vec16", "amx"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [32, 64, 128])
    @pytest.mark.parametrize("block_size", [32, 64, 96, 128])
    def test_what_the_engine_wrote_is_read_as_canonical(
        self, block_size: int, head_dim: int, dtype: str, isa: str | None
    ) -> None:
        from thaw.engines.vllm.worker.layout.packed import CpuPackedPages

        caches = self.caches(block_size, head_dim, dtype)
        layout = CpuPackedPages(caches, isa=isa)
        table, start, stop = [4, 1, 7, 2], 5, 4 * block_size - 3
        positions = torch.arange(start, stop)
        slots = torch.tensor(table)[positions // block_size] * block_size + positions % block_size
        rows = random_bits((2, 2, stop - start, 3, head_dim), dtype, seed=7)
        for layer in range(2):
            self.write(caches[f"layers.{layer}.attn"], rows[layer], slots, layout.isa)
        out = blank(layout, stop - start)
        layout.gather(table, start, stop, out)
        assert equal(out, rows.permute(3, 0, 1, 2, 4).contiguous())

    @pytest.mark.parametrize("isa", ["vec", "amx"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scatter_is_the_inverse_and_touches_nothing_else(self, dtype: str, isa: str) -> None:
        from thaw.engines.vllm.worker.layout.packed import CpuPackedPages

        caches = self.caches(32, 64, dtype)
        layout = CpuPackedPages(caches, isa=isa)
        table = [8, 0, 3, 5]
        for start, stop in ((0, 128), (0, 1), (31, 33), (7, 29), (40, 128), (127, 128), (64, 64)):
            before = {name: tensor.clone() for name, tensor in caches.items()}
            old, out = blank(layout, stop - start), blank(layout, stop - start)
            source = random_bits((3, 2, 2, 130, 64), dtype, seed=stop)[:, :, :, 2 : 2 + stop - start]
            layout.gather(table, start, stop, old)
            layout.scatter(table, start, stop, source)
            layout.gather(table, start, stop, out)
            assert equal(out, source.contiguous())
            layout.scatter(table, start, stop, old)
            assert all(equal(caches[name], before[name]) for name in caches)

    def test_host_tensors_may_be_views_of_any_strides(self) -> None:
        layout = make_layout(self.caches(32, 64, "bfloat16"))
        expected = blank(layout, 50)
        layout.gather([1, 2], 3, 53, expected)
        turned = torch.zeros(50, 64, 2, 2, 3, dtype=torch.bfloat16).permute(4, 3, 2, 0, 1)
        layout.gather([1, 2], 3, 53, turned)
        assert equal(turned.contiguous(), expected)
        layout.scatter([4, 5], 3, 53, turned)
        out = blank(layout, 50)
        layout.gather([4, 5], 3, 53, out)
        assert equal(out, expected)

    def test_a_copied_block_reads_as_its_source(self) -> None:
        layout = make_layout(self.caches(32, 64, "bfloat16"))
        source, copied = blank(layout, 32), blank(layout, 32)
        layout.gather([6], 0, 32, source)
        layout.copy_blocks([(6, 2)])
        layout.gather([2], 0, 32, copied)
        assert equal(source, copied)

    def test_the_isa_is_told(self) -> None:
        told = make_layout(self.caches(32, 64, "bfloat16")).describe()
        assert told["kind"] == "cpu-packed" and told["isa"] in ("vec", "amx", "neon", "rvv", "vxe", "vsx")

    def test_a_cache_whose_pages_lie_apart_is_refused(self) -> None:
        apart = {f"layers.{layer}": cache(4, 32, 2, 128).transpose(1, 2) for layer in range(2)}
        with pytest.raises(Unsupported, match="its pages lie apart"):
            make_layout(apart)

    def test_a_packing_that_is_not_read_back_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The check on the check: an op that loses a bit, and one that stores two numbers in one place."""
        from thaw.engines.vllm.worker.layout import packed

        honest = packed._write

        def quiet(cache: Any, key: Any, value: Any, slots: Any, isa: str) -> None:
            honest(cache, key.nan_to_num(), value, slots, isa)

        def twice(cache: Any, key: Any, value: Any, slots: Any, isa: str) -> None:
            honest(cache, key, value, slots // 2 * 2, isa)

        for wrong, named in ((quiet, "changes bits"), (twice, "fixed order")):
            monkeypatch.setattr(packed, "_write", wrong)
            with pytest.raises(Unsupported, match=named):
                packed.learn_packing.__wrapped__(torch.bfloat16, 64, 32, "vec")

    def test_tiles_are_asked_for_before_the_engine_uses_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only where the backend itself picked AMX; a system that does not grant them is told, not killed later."""
        from thaw.engines.vllm.worker.layout import packed

        granted: list[bool] = []
        monkeypatch.setattr(torch.cpu, "_init_amx", granted.pop)
        caches = self.caches(32, 64, "bfloat16")
        for found, answers in (("vec", []), ("amx", [True])):
            granted[:] = answers
            monkeypatch.setattr(packed, "_attention_isa", lambda *_, isa=found: isa)
            assert packed.CpuPackedPages(caches).isa == found
            assert not granted
        granted[:] = [False]
        with pytest.raises(Unsupported, match="does not let this process use it"):
            packed.CpuPackedPages(caches)
