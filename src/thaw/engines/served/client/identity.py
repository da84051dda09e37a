"""The identity of the model that a served engine runs, from its folder: equal to any other engine's for the same model.

The weights lie in the engine's workers. Here the model is a skeleton without bytes, which knows its class and its
resolved config, and the root of its weights comes from the cache beside the files or from the files themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from thaw.core.cache import CacheGroup
from thaw.core.errors import NotFound
from thaw.core.identity import ModelIdentity, identity_of
from thaw.engines.hf.codec import HFCodec
from thaw.engines.hf.config import function_config
from thaw.engines.hf.files import skeleton
from thaw.engines.hf.weights import root_of_folder


def model_identity(
    folder: Path,
    *,
    dtype: str,
    groups: tuple[CacheGroup, ...],
    codec: HFCodec,
    overrides: Mapping[str, Any] | None = None,
) -> ModelIdentity:
    """The identity of the model in `folder` (or of that hub id) when it runs in `dtype`, with the fields `overrides` in
    place of its config's.

    Raises `NotFound` when there is no such model here, `IncompleteModel` when its files are not its config's,
    `Unsupported` for one that comes with code of its own.
    """
    try:
        module = skeleton(folder, getattr(torch, dtype), overrides)
        root = root_of_folder(folder, dtype, overrides)
    except (OSError, ValueError) as error:
        raise NotFound(f"the model {folder} that the engine runs cannot be read here: {error}") from None
    return identity_of(
        architecture=type(module).__name__,
        weights=root,
        config=function_config(module.config.get_text_config(decoder=True).to_dict()),
        dtype=dtype,
        tokenizer=codec.identity(),
        groups=groups,
    )
