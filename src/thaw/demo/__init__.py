"""The demo: a small real model, a real document, and four questions about it.

`thaw.demo.model` fetches and converts the model (needs the extra `[transformers]`), `thaw.demo.prompts` holds
what is said to it. Importing them imports no torch; the CLI and the tests both read from here.
"""

from __future__ import annotations

from importlib import resources

__all__ = ["document"]


def document() -> str:
    """The handbook that the demo's model reads: between 3,300 and 4,000 SmolLM2 tokens of English."""
    return resources.files(__name__).joinpath("document.md").read_text(encoding="utf-8")
