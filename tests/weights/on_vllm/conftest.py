"""Engines here boot warm, as in `tests/engines/on_vllm`, and find thaw's loader by an entry point."""

from __future__ import annotations

import warm
from entry import found_in_session, of_engines

entry_is_found = found_in_session("vllm.general_plugins", "thaw_weights", "thaw.weights.vllm_loader:register")
if not warm._begun_with:  # nor are the engine's own tests in this run
    warm_boots = of_engines("on_vllm").warm_boots
