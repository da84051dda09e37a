"""docs/cli.md, written from the commands themselves: `python -m thaw.cli.reference` prints nothing and writes it.

A test checks that the page in the repository is what this writes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from thaw.cli import catalog
from thaw.cli.group import thaw

WIDTH = 96
EVERYWHERE = r"\n  (--json|-h, --help) +(Print one JSON document instead of text|Show this message and exit)\."
SHARED = ("Chat", "Sampling", "Engine")
"""Groups of options that several verbs have alike; `thaw fork` has all of them."""
HEAD = """# The command line

Generated from the commands (`make docs`). Each section is what `thaw VERB --help` prints, without `--json`, `--help`,
and the options that several verbs share: these are listed [once](#shared-options).

Data goes to stdout; progress and errors go to stderr. Every verb that prints data takes `--json`. It prints one JSON
document to stdout, with 64-bit integers as strings and keys that keep their meaning between versions. An error is then
`{"error": {"kind": …, "message": …}}`, also on stdout, with the same exit code. Colour is used only on terminals, and
never with `NO_COLOR`.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | the request cannot work as written: change it |
| 3 | refused: bytes exist, but using them would be wrong (other weights, another policy) |
| 4 | conflict: somebody else was first; check, then try again |
| 5 | damaged: stored bytes are not what was written; run `thaw fsck` |
| 6 | storage failed: disk full, read-only, or no permission |
| 7 | a law did not hold (`verify`, `demo`, `bench`, `receipt verify`) |
| 8 | the work stopped before it was done |
| 9 | a remote did not do what it was asked; nothing here has changed |
| 70 | an error inside thaw; run again with `THAW_DEBUG=1` for a traceback |
| 130 | interrupted; `run` commits what the model has generated |

| variable | meaning |
|---|---|
| `THAW_REPO` | the repository, unless `-C` names one |
| `THAW_NAMESPACE` | the namespace, unless `--namespace` names one |
| `THAW_MODEL` | the model of `thaw demo` |
| `THAW_CACHE_DIR` | where the demo's model is kept (default `~/.cache/thaw`) |
| `THAW_DEBUG` | show tracebacks and the libraries' own messages |
| `NO_COLOR` | turn colour off |
"""


def page() -> str:
    """The whole page; the same text on every machine."""
    return HEAD + "\n".join(_sections())


def _sections() -> Iterator[str]:
    top = click.Context(thaw, info_name="thaw")
    yield _section("thaw", _text(thaw, top))
    shared = _shared(top)
    yield _section("Shared options", "\n\n".join(shared))
    for title, verbs in catalog.SECTIONS.items():
        yield f"\n## {title}\n"
        for name in verbs:
            command = thaw.get_command(top, name)
            assert command is not None
            yield from _verb(command, click.Context(command, info_name=name, parent=top), f"thaw {name}", shared)


def _shared(top: click.Context) -> list[str]:
    """The help of each group of `SHARED`."""
    fork = thaw.get_command(top, "fork")
    assert fork is not None
    blocks = _text(fork, click.Context(fork, info_name="fork", parent=top)).split("\n\n")
    return [block for block in blocks if block.startswith(tuple(f"{title}:" for title in SHARED))]


def _verb(command: click.Command, context: click.Context, name: str, shared: list[str]) -> Iterator[str]:
    if not isinstance(command, click.Group):
        yield _section(name, _abridged(_text(command, context), shared))
        return
    for sub in command.list_commands(context):
        child = command.get_command(context, sub)
        assert child is not None
        yield from _verb(child, click.Context(child, info_name=sub, parent=context), f"{name} {sub}", shared)


def _text(command: click.Command, context: click.Context) -> str:
    """What --help prints."""
    formatter = click.HelpFormatter(width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    command.format_help(context, formatter)
    return formatter.getvalue().rstrip()


def _abridged(text: str, shared: list[str]) -> str:
    """The help without what every verb has, and with one line in place of the shared groups in it."""
    blocks = re.sub(EVERYWHERE, "", text).replace("\n\nOptions:\n\n", "\n\n").split("\n\n")
    left = [block for block in blocks if block not in shared]
    titles = [block.partition(":")[0] for block in blocks if block in shared]
    if titles:
        place = blocks.index(next(block for block in blocks if block in shared))
        left.insert(place, f"Shared options: {', '.join(titles)}.")
    return "\n\n".join(left)


def _section(name: str, text: str) -> str:
    return f"\n### {name}\n\n```text\n{text}\n```\n"


def main() -> None:
    """Write the page into the source tree that this module runs from, or to the path given."""
    default = Path(__file__).resolve().parents[3] / "docs" / "cli.md"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
