"""The transformers backend: packed forward passes over pages, the head, and the sampler."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache

from thaw.core.cache import keeps_all, point_groups
from thaw.core.errors import CorruptBlob, InvalidRequest, Unsupported
from thaw.core.identity import ModelIdentity
from thaw.core.ids import digest
from thaw.engines.embedded.backend import BOUNDARY_TOP, Backend, Feed
from thaw.engines.embedded.pages import PagedKV
from thaw.engines.hf.codec import HFCodec
from thaw.engines.hf.config import check_length, eos_of, num_positions, stop_set
from thaw.engines.hf.groups import layers
from thaw.engines.hf.recurrent import chunk
from thaw.engines.hf.weights import sample_weights
from thaw.engines.sampling.spec import Sampled, SampleSpec
from thaw.engines.transformers import guest, support
from thaw.engines.transformers.attention import NAME
from thaw.engines.transformers.head import StockHead, body_of
from thaw.engines.transformers.identity import model_identity
from thaw.engines.transformers.kv import TorchExtent
from thaw.engines.transformers.loading import LoadedModel, weights_like
from thaw.engines.transformers.packed import Packed
from thaw.engines.transformers.resting import RestingWeights
from thaw.engines.transformers.sampler import choose, largest
from thaw.engines.transformers.single import Single, check, positions, takes_positions

UNBOUNDED = 1 << 20
"""The length of a model whose config names no number of positions."""
PROBE_TOKENS = 24
PROBE_TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference of log probabilities between thaw's path and the stock model's that passes at boot."""


class TransformersBackend(Backend):
    def __init__(
        self, loaded: LoadedModel, *, max_model_len: int | None, interior: bool = False, recent_points: int = 0
    ) -> None:
        if not isinstance(recent_points, int) or recent_points < 0:
            raise InvalidRequest(f"recent_points={recent_points!r}: how many tokens a session can go back, 0 or more")
        self.recent_points = recent_points
        self._loaded, module = loaded, loaded.module
        self._module, self._head = module, module.get_output_embeddings()
        if self._head is None:
            raise Unsupported(f"{type(module).__name__} has no language-model head")
        self._device, self._dtype = module.device, module.dtype
        self._hashed_once = False
        self.name, self.version, self.model = "transformers", transformers.__version__, loaded.name
        self.device = str(self._device)
        found = support.examine(module.config.to_dict(), str(self._dtype))
        self.groups, self._is_packed = found.groups, found.packed
        self.keeps_interior = keeps_all(self.groups) or (interior and not point_groups(self.groups))
        self.placeholders = support.placeholders(module.config.to_dict())
        text = module.config.get_text_config(decoder=True)
        self.vocab_size = int(text.vocab_size)
        self.max_model_len = _max_len(text.to_dict(), max_model_len)
        self._kept = layers(text.to_dict())
        self.point_multiple = chunk(text.to_dict())
        self._pass: Packed | Single
        if self._is_packed:
            self._pass = Packed(module.base_model, self._device)
        else:
            self._pass = Single(body_of(module), self._kept, self.groups, self._device)
            self._stock_head = StockHead(module)
        named = eos_of(module.generation_config, text)
        self.eos_token_ids = stop_set(named, loaded.tokenizer, self.vocab_size)
        self.codec: HFCodec = HFCodec(loaded.tokenizer, self.eos_token_ids)
        self.numerics = _numerics(self._device) | (_kernels() if point_groups(self.groups) else {})
        self._first_sample: str | None = None
        self._resting = RestingWeights(module, self._device, loaded)
        self._probe()

    def extent(self, num_pages: int) -> TorchExtent:
        return TorchExtent(self.groups, num_pages, self._device)

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> list[torch.Tensor]:
        return self._pass.forward(feeds)

    @torch.inference_mode()
    def logits(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """[rows, vocabulary]; row by row for models whose sessions run one by one."""
        logits_BV: torch.Tensor
        if self._is_packed:
            logits_BV = self._head(torch.stack(list(rows)))
        else:
            logits_BV = torch.stack([self._stock_head(row) for row in rows])
        return logits_BV.float().cpu()

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
        return [choose(logits[i], spec) for i, spec in enumerate(specs)]

    @torch.inference_mode()
    def boundary(self, logits: torch.Tensor, index: int) -> tuple[str, tuple[tuple[int, float], ...]]:
        row_V = logits[index]
        return digest(row_V.numpy().tobytes()), largest(torch.log_softmax(row_V, 0), BOUNDARY_TOP)

    def row_bytes(self, row: torch.Tensor) -> tuple[bytes, str, tuple[int, ...]]:
        data = row.cpu().view(torch.uint8).numpy().tobytes()
        return data, str(row.dtype).removeprefix("torch."), tuple(row.shape)

    def row_from(self, data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        size = int(self._head.weight.shape[1])
        expected = (str(self._dtype).removeprefix("torch."), (size,), size * self._dtype.itemsize)
        if (dtype, shape, len(data)) != expected:
            raise CorruptBlob(f"the stored hidden state is {dtype} {list(shape)}; expected {expected[0]} [{size}]")
        return torch.frombuffer(bytearray(data), dtype=self._dtype).to(self._device, copy=True)

    def identity(self) -> ModelIdentity:
        fresh = self._hashed_once or self.weights_sample() != self._first_sample
        self._hashed_once = True
        return model_identity(self._loaded, self.codec, self.groups, fresh=fresh)

    def weights_of(self, source: str | Path) -> Callable[[], None]:
        """A folder or hub id of the same model: its config must say the same of the function."""
        if self._loaded.owner is not None:
            raise Unsupported("the weights are those of a module that is not thaw's; change them there")
        module = weights_like(self._module, str(source))

        def put() -> None:
            with torch.inference_mode():
                for name, tensor in self._module.state_dict().items():
                    tensor.copy_(module[name])
            self._resting.source = str(source)

        return put

    def require_sleep(self, level: int) -> None:
        self._resting.require(level)

    def sleep(self, level: int) -> None:
        self._resting.leave(level)

    def free(self) -> None:
        self._resting.free()

    def wake(self) -> None:
        self._resting.come_back()

    def weights_sample(self) -> str:
        sample = sample_weights(self._module)
        if self._loaded.owner is not None:
            sample += guest.stamp(self._loaded.owner, self._module)
        if self._first_sample is None:
            self._first_sample = sample
        return sample

    def _probe(self) -> None:
        """Check thaw's path against the stock model on a few tokens: what it computes must be this model."""
        tokens = [(7919 * (i + 1)) % self.vocab_size for i in range(PROBE_TOKENS)]
        kv = PagedKV(self)
        kv.reserve(PROBE_TOKENS)
        self.forward([Feed(kv, tokens[:-4])])
        ours_V = torch.log_softmax(self.logits(self.forward([Feed(kv, tokens[-4:])]))[0], 0)
        stock_V = self._stock_packed(tokens) if self._is_packed else self._stock_cached(tokens)
        gap = float((ours_V - torch.log_softmax(stock_V.float().cpu(), 0)).abs().max())
        if not gap <= PROBE_TOLERANCE[self._dtype]:
            raise Unsupported(
                f"{type(self._module).__name__}: thaw's attention and head differ from the model's own by {gap:.3g} in "
                f"log probability (at most {PROBE_TOLERANCE[self._dtype]:g} passes): it computes something thaw does "
                "not know"
            )

    def _stock_packed(self, tokens: list[int]) -> torch.Tensor:
        """The stock model's logits after `tokens`, with attention of its own."""
        self._module.set_attn_implementation("sdpa")
        try:
            return self._stock(tokens, None)
        finally:
            self._module.set_attn_implementation(NAME)

    def _stock_cached(self, tokens: list[int]) -> torch.Tensor:
        """The same with its own cache and by the same feeds; raises `Unsupported` for a cache of another kind."""
        cache = DynamicCache(config=self._module.config)
        self._stock(tokens[:1], cache)
        check(type(self._module).__name__, cache, self._kept, 1, str(self._dtype).removeprefix("torch."))
        cache = DynamicCache(config=self._module.config)
        self._stock(tokens[:-4], cache)
        return self._stock(tokens[-4:], cache, len(tokens) - 4)

    def _stock(self, tokens: list[int], cache: DynamicCache | None, start: int = 0) -> torch.Tensor:
        """Positions are given, for some classes count from 0 whatever their cache holds."""
        with torch.inference_mode():
            out = self._module(
                input_ids=torch.tensor([tokens], device=self._device),
                past_key_values=cache,
                use_cache=cache is not None,
                **(positions(start, len(tokens), self._device) if takes_positions(self._module) else {}),
            )
        logits: torch.Tensor = out.logits[0, -1]
        return logits


def _max_len(config: dict[str, object], wanted: int | None) -> int:
    check_length(config, wanted)
    return wanted or num_positions(config) or UNBOUNDED


def _numerics(device: torch.device) -> dict[str, str]:
    out = {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "attention": "paged-flash" if device.type == "cpu" else "paged-math",
    }
    if device.type == "cuda":
        out["cuda_device"] = torch.cuda.get_device_name(device)
    return out


def _kernels() -> dict[str, str]:
    """The packages whose kernels recurrent layers run with where they are installed, and their versions."""
    found = {}
    for name in ("flash-linear-attention", "causal-conv1d", "mamba-ssm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
