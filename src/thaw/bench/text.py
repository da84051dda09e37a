"""A document to measure with when none is given: plain English sentences, the same every time, as long as is wanted."""

from __future__ import annotations

_WHO = ("The engineer", "A reader", "The scheduler", "Every worker", "The archive", "A visitor", "A clock", "Nobody")
_DOES = ("keeps", "reads", "forgets", "measures", "repairs", "describes", "carries", "counts")
_WHAT = ("the long letter", "a small engine", "its own history", "the frozen river", "two heavy books", "the last page")
_WHEN = (
    "before noon",
    "in the winter",
    "after every change",
    "without a word",
    "as agreed",
    "twice a year",
    "at night",
)


def document(num_sentences: int) -> str:
    """`num_sentences` sentences (each 8 to 12 tokens in common vocabularies), numbered, so that none repeats."""
    return " ".join(_sentence(i) for i in range(num_sentences))


def _sentence(i: int) -> str:
    who, does, what, when = (
        table[(i * step + i // len(table)) % len(table)] for table, step in zip(_TABLES, (1, 3, 5, 2), strict=True)
    )
    return f"{i + 1}. {who} {does} {what} {when}."


_TABLES = (_WHO, _DOES, _WHAT, _WHEN)
