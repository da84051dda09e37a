"""Several children that generate at once: on a terminal a live table, one row a child; elsewhere only progress."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from thaw.cli import output
from thaw.cli.progress import Progress

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from thaw.repo.stream import Stream

T = TypeVar("T")
MAX_ROWS = 32
PER_SECOND = 8


def follow(stream: Stream[list[T]], names: list[str], *, quiet: bool) -> list[T]:
    """Wait for all of them. The table disappears when they are done; the caller prints what is to stay."""
    with Board(names, quiet=quiet) as board:
        for delta in stream:
            board.add(delta.index, delta.text)
    return stream.result()


class Board:
    """`with Board(names) as board: board.add(i, text)`: the last words of each child, wiped at the end."""

    def __init__(self, names: list[str], *, quiet: bool = False) -> None:
        self._names, self._texts = names, [""] * len(names)
        self._live: Live | None = None
        self._plain = Progress(f"generating {len(names)} children")
        self._drawn = output.is_terminal(sys.stderr) and not quiet

    def add(self, index: int, text: str) -> None:
        self._texts[index] += text
        if self._live is not None:
            self._live.update(self._table())

    def __enter__(self) -> Board:
        if not self._drawn:
            self._plain.__enter__()
            return self
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, no_color=not output.has_colour(sys.stderr), highlight=False)
        self._live = Live(self._table(), console=console, transient=True, refresh_per_second=PER_SECOND)
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self._live or self._plain).__exit__(kind, error, trace)

    def _table(self) -> Table:
        """As many rows as the terminal has, as many of each child's last words as fit on its line."""
        from rich.table import Table
        from rich.text import Text

        size = shutil.get_terminal_size()
        rows = min(len(self._names), MAX_ROWS, max(size.lines - 3, 1))
        room = max(min(size.columns, output.MAX_WIDTH) - max(map(len, self._names)) - 6, 10)
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, text in list(zip(self._names, self._texts, strict=True))[:rows]:
            flat = " ".join(output.clean(text).split())
            table.add_row(Text(f"  {name}", "bold"), Text(flat if len(flat) <= room else "…" + flat[-room + 1 :]))
        if rows < len(self._names):
            table.add_row(Text(f"  and {len(self._names) - rows} more", "dim"), Text(""))
        return table
