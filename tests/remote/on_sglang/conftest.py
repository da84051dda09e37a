"""Engines here boot warm, as in `tests/engines/on_sglang`, and find the tier of what lands by an entry point."""

from __future__ import annotations

import warm
from entry import found_in_session, of_engines

entry_is_found = found_in_session("thaw.tiers", "landing", "thaw.remote.landing:open_landing")
if not warm._begun_with:  # nor are the engine's own tests in this run
    warm_boots = of_engines("on_sglang").warm_boots
