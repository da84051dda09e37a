"""Processes that read packs for another one, into memory that both have mapped. No torch, no engine."""
