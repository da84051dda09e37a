"""Tiers: the places where a store's packs lie. `base.py` says what one is; a file here is one kind."""
