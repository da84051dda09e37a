"""Packs in the memory of another process, behind HTTP: `distant://HOST:PORT`."""
