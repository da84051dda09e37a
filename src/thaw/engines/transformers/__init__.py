"""The transformers engine: causal language models in this process, on CPU or CUDA.

The model is stock; thaw brings its own cache, pages of 256 tokens. Models of one plain full group get thaw's attention
over it, through transformers' public `AttentionInterface`: sequences run packed in one row without padding, and
children of a fork attend to one stored prefix. Models with windows or latents, or an attention of their own, run as
they are, one session a pass. What is supported is decided by `support.py`, from the config alone.
"""

from __future__ import annotations

from typing import Any

from thaw.engines.base import Engine


def load(
    *,
    model: Any,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    max_model_len: int | None = None,
    policy: str = "0",
    recent_points: int = 0,
    interior: bool = False,
) -> Engine:
    """Boot the engine. `model` is a folder, a hub id, or a loaded transformers module (then give `tokenizer` too).

    `dtype` "bfloat16", "float16" or "float32" (default: the weights' own); `device` "cpu" or "cuda" (default: cpu, or
    where the given module is); `threads` sets torch's CPU threads. `interior`: of layers with a window keep all tokens
    and not the last ones alone, so that a session can be forked at any earlier token. Raises `Unsupported`
    naming what is not.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        from thaw.core.errors import NotFound

        raise NotFound(f"the transformers engine needs {error.name}: pip install 'thaw-vllm[transformers]'") from None
    from thaw.engines.embedded.engine import EmbeddedEngine
    from thaw.engines.transformers.backend import TransformersBackend
    from thaw.engines.transformers.loading import load_model

    loaded = load_model(model, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads)
    backend = TransformersBackend(
        loaded, max_model_len=max_model_len, interior=interior, recent_points=recent_points
    )  # fmt: skip
    return EmbeddedEngine(backend, policy=policy)
