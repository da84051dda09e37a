"""What was measured, in a receipt's words: an engine's model, and what its bits may depend on."""

from __future__ import annotations

from pathlib import Path

from thaw.core import cache, objects
from thaw.engines.base import Engine, EngineInfo
from thaw.receipt import Model


def model_of(engine: Engine) -> Model:
    """Name without its folder, identity, and bytes of KV a token."""
    info, identity = engine.info, engine.identity()
    return Model(
        name=Path(info.model).name or info.model,
        architecture=identity.architecture,
        dtype=identity.dtype,
        identity=objects.encode(identity)[0],
        kv_token_nbytes=cache.token_nbytes(info.groups),
    )


def numerics(info: EngineInfo) -> dict[str, str]:
    """As parameters of a receipt, whose names have no spaces."""
    return {f"numerics.{name.replace(' ', '_')}": value for name, value in info.numerics.items()}


def accelerator(info: EngineInfo) -> str | None:
    """Its own name where the engine tells it, else what the engine calls it; None for the CPU."""
    return info.numerics.get("layout.accelerator") or (None if info.device == "cpu" else info.device)
