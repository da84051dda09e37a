"""Generated pages are current; links between the pages, and files that the tour names, lead somewhere; pages are in
plain English."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_generated_pages_are_what_make_docs_writes() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.pages().items():
        assert path.read_text() == text, f"{path.name} is stale: run make docs"


IDIOMS = {
    r"\bhangs? on (a|an|how|its|the|what|when)\b": "depend on",
    r"\bamid\b": "during, in the middle of",
    r"\botherwise than\b": "differently from",
    r"\b(go|goes|going|gone|went) on (from|with)\b": "continue from, continue",
    r"\banew\b": "again",
    r"\bwhoever\b": "the one who it is: the caller, the client, another process",
}
"""What a native technical writer would not write, and what they would."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def idioms(text: str) -> list[str]:
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    found = ((hit[0], better) for idiom, better in IDIOMS.items() for hit in re.finditer(idiom, prose, re.I))
    return [f"{said!r}: better {better}" for said, better in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_say_it_in_plain_english(page: Path) -> None:
    assert idioms(page.read_text()) == []


def test_an_idiom_is_noticed_in_prose_and_not_in_code() -> None:
    assert idioms("It hangs on the shape. A hook hangs on `hang on the`, `amid` and\n```\nanew\n```\n") == [
        "'hangs on the': better depend on"
    ]


def signposts(tour: str) -> list[list[str]]:
    """The files and folders of each row of the tour's last table, and of its steps to a new kind of cache."""
    rows = tour.partition("## Where to look first")[2].splitlines()
    return [found for row in rows if (found := re.findall(r"`([\w./-]+(?:\.py|/))`", row))]


def lost(rows: list[list[str]], root: Path) -> list[str]:
    """Those that are not there: each from `root`, from `src/thaw`, or beside the one that its row begins with."""
    missing = []
    for row in rows:
        first = next((at / row[0] for at in (root, root / "src" / "thaw") if (at / row[0]).exists()), None)
        beside = () if first is None else (root, root / "src" / "thaw", first.parent)
        missing += [name for name in row if not any((at / name).exists() for at in beside)]
    return missing


def test_each_file_that_the_tour_names_is_there() -> None:
    rows = signposts((ROOT / "docs" / "architecture.md").read_text())
    assert len(rows) > 35 and lost(rows, ROOT) == []


def test_a_file_that_is_gone_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "src" / "thaw" / "core").mkdir(parents=True)
    (tmp_path / "src" / "thaw" / "core" / "cache.py").write_text("")
    rows = signposts(
        "## Where to look first\n| a | `src/thaw/core/cache.py`, `ids.py` |\n1. `core/`, `core/cache.py`\n"
    )
    assert rows == [["src/thaw/core/cache.py", "ids.py"], ["core/", "core/cache.py"]]
    assert lost(rows, tmp_path) == ["ids.py"]
