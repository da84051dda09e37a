"""The data plane: packs, hashing, reading and writing. Usable inside an engine's worker; no engine, no database."""
