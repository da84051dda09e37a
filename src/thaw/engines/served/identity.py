"""The identity of the model that a vLLM runs, from its folder: equal to any other engine's for the same model.

The weights lie in vLLM's workers. Here the model is a skeleton without bytes, which knows its class and its resolved
config, and the root of its weights comes from the cache beside the files or from the files themselves.
"""

from __future__ import annotations

from pathlib import Path

import torch

from thaw.core.identity import CacheGroup, ModelIdentity
from thaw.engines.hf.codec import HFCodec
from thaw.engines.hf.config import function_config
from thaw.engines.hf.files import skeleton
from thaw.engines.hf.weights import root_of_folder


def model_identity(folder: Path, *, dtype: str, group: CacheGroup, codec: HFCodec) -> ModelIdentity:
    """The identity of the model in `folder` (or of that hub id) when it runs in `dtype`.

    Raises OSError or ValueError when there is no such model.
    """
    module = skeleton(folder, getattr(torch, dtype))
    return ModelIdentity(
        architecture=type(module).__name__,
        weights=root_of_folder(folder, dtype),
        config=function_config(module.config.to_dict()),
        dtype=dtype,
        tokenizer=codec.identity(),
        groups=(group,),
    )
