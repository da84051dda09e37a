"""`thaw show`: one point in full, without an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thaw.cli import light, output, place, view, words
from thaw.repo.chat_meta import KEY

if TYPE_CHECKING:
    from thaw.repo.show import Shown

EXAMPLE = """
thaw show main
thaw show main:turn=1 --text
thaw show --html sessions.html
"""
LINES = 8
POINTS = 8


@light.verb(
    "show",
    EXAMPLE,
    light.Argument("point"),
    light.Flag("whole_text", ("--text",), "Print only the full text of every turn."),
    light.Flag("tokens", ("--tokens",), "With --json, add the token ids."),
    light.LightText("html", ("--html",), "Write a page with the tree of sessions to FILE; - is stdout.", "FILE"),
)
def command(
    named: str | None, point: str | None, whole_text: bool, tokens: bool, html: str | None, as_json: bool
) -> None:
    """Show POINT (default: HEAD): commit, state, turns, origin and size.

    With --html: write one file that a browser shows without a server: all sessions, or with POINT those before and
    after it. An existing FILE is replaced.
    """
    if html is not None:
        if whole_text or tokens or (as_json and html == "-"):
            raise light.usage("--html writes a whole page; leave out --text, --tokens, and --json beside --html -.")
        _write_page(named, point, html, as_json)
        return
    shown = _read(named, point or "HEAD")
    if as_json:
        output.print_json(_plain(shown, tokens))
    elif whole_text:
        output.line(output.clean(shown.text))
    else:
        _print(shown)


def _write_page(named: str | None, point: str | None, path: str, as_json: bool) -> None:
    import os.path
    from pathlib import Path

    from thaw.tree.details import codec_at_hand
    from thaw.tree.page import TreeFile

    target = Path(path).expanduser()
    if path != "-" and (not target.name or os.path.isdir(target)):
        raise light.usage(f"--html {path!r} names no file; give one, for example sessions.html, or - for stdout.")
    with place.open_repository(named) as repo:
        page = TreeFile(repo, path, point, codec_at_hand(repo))
        data = page.html().encode()
    if path == "-":
        output.write(data.decode())
        return
    output.write_file(target, data)
    if as_json:
        output.print_json({"file": path, "num_bytes": len(data), "num_commits": page.num_commits})
    else:
        output.note(f"{path}: {words.nbytes(len(data))}, {words.count(page.num_commits, 'commit')}")


def _read(named: str | None, point: str) -> Shown:
    with place.open_repository(named) as repo:
        return repo.show(point)


def _plain(shown: Shown, with_tokens: bool) -> dict[str, object]:
    left_out = ["tokens", "entry", *(["resumable"] if shown.resumable is None else [])]
    left_out += [] if shown.kv_ranges else ["kv_ranges"]
    fields = {name: getattr(shown, name) for name in shown.__struct_fields__ if name not in left_out}
    entry = view.plain_entry(shown.entry)
    if not shown.kv_ranges:  # of the point, not of its commit
        entry.pop("kv_ranges", None)
    tokens = {"token_ids": shown.tokens} if with_tokens else {}
    return {**entry, **fields, "seed": str(shown.seed), "num_tokens": len(shown.tokens), **tokens}


def _print(shown: Shown) -> None:
    entry = shown.entry
    output.line(output.style(f"commit {entry.commit}", "yellow"))
    for name, value in _fields(shown):
        view.field(name, value)
    output.line()
    view.block(entry.message or "(no message)", indent="    ")
    for number, turn in enumerate(shown.turns, 1):
        output.line()
        output.line(view.turn_title(turn, number))
        view.block(turn.text or "(cut inside this turn; its text needs the tokenizer)", limit=LINES)


def _fields(shown: Shown) -> list[tuple[str, str]]:
    entry, model = shown.entry, shown.model
    fields = [
        *([("names", output.style(", ".join(entry.refs), "bold", "green"))] if entry.refs else []),
        ("state", str(entry.state)),
        *((f"parent{' (not fetched)' if entry.shallow else ''}", str(parent)) for parent in entry.parents),
        ("date", f"{words.moment(entry.time_ns)} ({words.age(entry.time_ns)})"),
        ("length", _length(shown)),
        ("bytes", f"{words.nbytes(shown.nbytes)} in {words.count(shown.num_blobs, 'blob')}"),
        ("model", f"{model.architecture}, {model.dtype}, weights {model.weights[:13]}, policy {model.policy}"),
        *([("KV", f"of {view.kv_by_policy(shown.kv_ranges)}")] if shown.kv_ranges else []),
        ("origin", _origin(entry.origin)),
        ("continues", _boundary(shown)),
        *([] if shown.resumable is None else [("points", _points(shown.resumable))]),
        *([("states", view.states(entry.points, entry.state_nbytes))] if entry.state_nbytes else []),
    ]
    told = {key: value for key, value in entry.meta.items() if key != KEY}
    return fields + [(f"meta {key}", output.one_line(value, 100)) for key, value in sorted(told.items())]


def _length(shown: Shown) -> str:
    where = "" if shown.point.at_end else f" of {shown.entry.num_tokens:,}, inside the commit"
    text = f"{words.count(len(shown.tokens), 'token')}{where}, {words.count(len(shown.turns), 'turn')}"
    return f"{text}, KV of {shown.num_kv:,}"


def _origin(origin: dict[str, str]) -> str:
    first = f"{origin.get('engine', '?')} {origin.get('version', '')} on {origin.get('device', '?')}"
    return f"{first.replace('  ', ' ')}, thaw {origin.get('thaw', '?')}"


def _points(resumable: tuple[int, ...]) -> str:
    """The last tokens that can be continued from."""
    last = ", ".join(map(str, resumable[-POINTS:]))
    return (
        f"{words.count(len(resumable), 'token')} that can be continued from: {'… ' * (len(resumable) > POINTS)}{last}"
    )


def _boundary(shown: Shown) -> str:
    if shown.unfinished:
        how = "inside a completion"
    elif shown.boundary is not None and shown.boundary.hidden is not None:
        how = "from its kept hidden state, without a forward pass"
    else:
        how = "after one decode step"
    return f"{how}, seed {shown.seed}"
