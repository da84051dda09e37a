"""SGLang's entry point to thaw's loader (`sglang.srt.plugins`), called once in every process of an engine.

SGLang takes a loader's class from programs, but none by name from its command line. So thaw wraps the function that
chooses the loader: for a folder whose tensors lie in a store it gives thaw's, for every other one SGLang's own.
Without the plug-in, SGLang finds no weights in such a folder and does not start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = "sglang.srt.model_loader.loader.get_model_loader"


def register() -> None:
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return  # a process without a model
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, loader_for, HookType.AROUND)


def loader_for(original: Callable[..., Any], load_config: Any, model_config: Any = None, **more: Any) -> Any:
    """The loader for a model."""
    from thaw.engines.hf.stored import is_stored

    if model_config is not None and is_stored(Path(str(model_config.model_path))):
        from thaw.weights.sglang_loader import ThawSglangLoader

        return ThawSglangLoader(load_config)
    return original(load_config, model_config, **more)
