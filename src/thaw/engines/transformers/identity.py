"""The identity of a loaded transformers model."""

from __future__ import annotations

from thaw.core.cache import CacheGroup
from thaw.core.identity import ModelIdentity, identity_of
from thaw.engines.hf.codec import HFCodec
from thaw.engines.hf.config import function_config
from thaw.engines.hf.weights import root_of_module
from thaw.engines.transformers.loading import LoadedModel


def model_identity(
    loaded: LoadedModel, codec: HFCodec, groups: tuple[CacheGroup, ...], *, fresh: bool
) -> ModelIdentity:
    """Hash the model as it is. `fresh`: the weights changed in memory, so no cached root is used or written."""
    module = loaded.module
    return identity_of(
        architecture=type(module).__name__,
        weights=root_of_module(module, None if fresh else loaded.folder),
        config=function_config(module.config.get_text_config(decoder=True).to_dict()),
        dtype=str(module.dtype).removeprefix("torch."),
        tokenizer=codec.identity(),
        groups=groups,
    )
