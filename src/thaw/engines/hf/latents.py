"""The order of the numbers in a latent (MLA): those of the compressed KV, then the roped part of the key.

The roped part is the format's as transformers' own class of the model caches it. Weights have pairs, of which each is
rotated. Some classes leave pairs; others put the first numbers of all pairs before the second ones. Other engines leave
pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thaw.core.errors import Unsupported

HALVES = {"deepseek_v2": False, "deepseek_v3": True, "glm4_moe_lite": True, "minicpm3": False}
"""Types of models with latents that engines other than transformers' may have, and whether its class puts the first
numbers of all pairs before the second ones. MiniCPM3's weights have no pairs, and nobody reorders them."""


def num_halved(config: Mapping[str, Any]) -> int:
    """How many numbers at the end of a latent are pairs in other engines and halves in the format: all of the roped
    part, or 0. `config`: of the text model.

    Raises `Unsupported` for a type whose order is not known, and for weights that have halves."""
    kind = config.get("model_type")
    if kind not in HALVES:
        known = ", ".join(sorted(HALVES))
        raise Unsupported(
            f"MLA (latent attention) of models of type {kind}: the order of its numbers is known of {known}"
        )
    if config.get("rope_interleave") is False:
        raise Unsupported("rope_interleave=False: only latents whose weights have pairs are captured here")
    return int(config["qk_rope_head_dim"]) if HALVES[kind] else 0
