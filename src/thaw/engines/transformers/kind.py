"""What the registry knows of the transformers engine: it joins a model of this process, and has no server."""

from __future__ import annotations

from typing import Any

from thaw.core.errors import InvalidRequest
from thaw.engines.base import Engine
from thaw.engines.kind import EngineKind, called


class Transformers(EngineKind):
    name = "transformers"
    packages = ("torch", "transformers", "tokenizers", "numpy")
    advice = "pip install 'thaw-vllm[transformers]' from the clone adds it."

    def load(self, **options: Any) -> Engine:
        from thaw.engines.transformers import load

        return called(self.name, load, **options)

    def attach(self, target: Any, *, policy: str = "0", api_key: str | None = None, **options: Any) -> Engine:
        """A loaded module; `options` are those of `load`, its `tokenizer` among them."""
        if isinstance(target, str):
            return super().attach(target)
        if api_key is not None:
            raise InvalidRequest("api_key goes with the address of a server")
        from thaw.engines.registry import load_engine

        return load_engine(self.name, model=target, policy=policy, **options)

    def recognises(self, target: object) -> bool:
        """A torch module, found without importing torch."""
        return any(
            kind.__module__.startswith("torch.nn.") and kind.__name__ == "Module" for kind in type(target).__mro__
        )


KIND = Transformers()
