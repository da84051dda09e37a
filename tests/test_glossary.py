"""The glossary: each name of thaw exists, each word stands once. The engines' words: see `on_vllm` and `on_sglang`."""

from __future__ import annotations

from pathlib import Path

import glossary

SRC = Path(__file__).resolve().parent.parent / "src"


def test_each_name_of_thaw_exists() -> None:
    assert glossary.names(glossary.THAW) - glossary.defined(SRC) == set()


def test_each_row_says_what_it_is_and_its_word_in_both_engines() -> None:
    rows = glossary.rows()
    assert len(rows) >= 40
    assert [row[0] for row in rows if len(row) != 4 or not all(row)] == []


def test_a_word_stands_once() -> None:
    words = [row[0] for row in glossary.rows()]
    assert sorted(set(words)) == sorted(words)


def test_a_name_that_is_gone_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("class Arena:\n    def room(self): ...\n\ndef extend(): ...\n")
    assert glossary.defined(tmp_path) == {"Arena", "Arena.room", "extend"}
    assert glossary.unknown({"Arena", "Aren"}, tmp_path) == {"Aren"}
    assert glossary.rows("| thaw | what |\n|---|---|\n| arena, `Arena` | memory |\n") == [["arena, `Arena`", "memory"]]
