"""The random models of `thaw.testing` are deterministic, and they look at their KV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from thaw.testing.models import ARCHITECTURES, VOCAB_SIZE, make_random_model  # noqa: E402

TOKENS = [(7 * i * i + 3 * i) % 256 for i in range(300)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equal_arguments_write_equal_bytes(arch: str, tmp_path: Path) -> None:
    first, second = (make_random_model(arch, tmp_path / name, seed=3) for name in ("a", "b"))
    assert {p.name for p in first.iterdir()} == {p.name for p in second.iterdir()}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logprobs_depend_on_kv_far_back(arch: str, dtype: str, tiny_model: Callable[..., Path]) -> None:
    """The negative control of every cache test: change one early token's KV, and the next logprobs move."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(arch, dtype=dtype))
    assert str(model.dtype) == f"torch.{dtype}"
    for layer in range(model.config.num_hidden_layers):
        moved = (_next_logprobs(model) - _next_logprobs(model, corrupt=(layer, 20))).abs().max()
        assert moved > 1e-3, f"layer {layer}"


def test_another_seed_is_another_model(tiny_model: Callable[..., Path]) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    first, second = (_next_logprobs(load(tiny_model(seed=seed))) for seed in (0, 1))
    assert not torch.allclose(first, second)


def test_a_byte_is_a_token(tiny_model: Callable[..., Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model())
    text = "Grüße, 123 – ok\n\t☃ "
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat).input_ids
    assert ids[0] == tokenizer.bos_token_id == 257 and tokenizer.eos_token_id == 258 and max(ids) < VOCAB_SIZE


def _next_logprobs(model: object, corrupt: tuple[int, int] | None = None) -> torch.Tensor:
    """Prefills all tokens but the last, flips the sign of one value vector if asked, and decodes the last."""
    with torch.no_grad():
        cache = model(torch.tensor([TOKENS[:-1]])).past_key_values
        if corrupt is not None:
            layer, position = corrupt
            cache.layers[layer].values[:, :, position] *= -1
        logits = model(torch.tensor([TOKENS[-1:]]), past_key_values=cache).logits[0, -1]
    return torch.log_softmax(logits.float(), -1)
