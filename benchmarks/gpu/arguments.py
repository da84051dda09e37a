"""What every bench for a GPU is told: `MODEL OUT [PARTS] [--small]`."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(doc: str | None, *, parts: bool = True) -> argparse.ArgumentParser:
    """Takes these, and what a bench adds; `doc` is its help."""
    words = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model")
    words.add_argument("out", type=Path)
    if parts:
        words.add_argument("parts", help="joined by commas")
    words.add_argument("--small", action="store_true")
    return words


def with_readers(words: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Takes `--readers` as well."""
    words.add_argument("--readers", type=int, default=0, help="processes that read packs (0: threads do)")
    return words
