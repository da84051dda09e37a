"""Whole pages: that of a server, the one that asks for a key, and the file that needs no server.

Both carry a strict Content-Security-Policy: nothing is loaded from elsewhere, and no script runs but ours. A server
sends script and style sheet by themselves; a file holds them, and its policy names their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Collection, Iterator, Mapping
from importlib import resources

from thaw.core.errors import Damaged
from thaw.core.ids import CommitId, short
from thaw.engines.base import Codec
from thaw.repo.repository import PointLike, Repository
from thaw.tree import parts
from thaw.tree.details import PointShown, read_point
from thaw.tree.markup import Html, each, el, join
from thaw.tree.outline import OutlineHistory, kept_on_no_branch
from thaw.tree.parts import ID_DIGITS, FragmentRoom, RowMaker

FILE_NBYTES = 300_000
"""Of a file, and of a server's first page, at most."""
SPARE = 100
"""Of a file, for what is put in once all is known."""
ICON = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E"
SERVER_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HINT = "Choose a session: its turns, their text and log probabilities are shown here."
KEYS = f"{HINT} Arrow keys move in the tree."
"""What the page's script makes of it."""


@functools.cache
def static(name: str) -> str:
    """The script or the style sheet."""
    return (resources.files("thaw.tree") / "static" / name).read_text("utf-8")


def document(title: str, head: Html, body: Html, **attributes: str | None) -> Html:
    page = el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            head,
            el("title", title),
            el("link", rel="icon", href=ICON),
        ),
        el("body", body),
        lang="en",
        **attributes,
    )
    return Html(f"<!doctype html>\n{page}\n")


def frame(
    title: str,
    totals: Html,
    tree: Html,
    detail: Html,
    *,
    account: Html | None = None,
    running: Html | None = None,
    foot: Html,
) -> Html:
    """What both kinds of page have between head and end. `running`: what is under way, in a server's."""
    back = el("p", el("a", "↑ sessions", href="#sessions"), class_="back")
    return join(
        el("header", account, el("h1", title), totals),
        running,
        el(
            "main",
            el("nav", tree, id="sessions", aria_label="Sessions"),
            el("div", back, el("section", detail, id="detail", aria_label="The chosen session")),
        ),
        el("p", id="status", role="status", aria_live="polite"),
        el("footer", foot),
    )


def title_of(repo: Repository) -> str:
    """The name of the folder that the repository is about, and of the namespace."""
    folder = repo.path.absolute()
    name = (folder.parent if folder.name.startswith(".") else folder).name or "thaw"
    return f"{name}, {repo.namespace}: sessions" if repo.namespace else f"{name}: sessions"


def empty_tree() -> Html:
    return el("p", "No commits yet. ", el("code", "thaw run"), " creates the first one.", class_="empty")


# -- a server's


def server_head() -> Html:
    return join(
        el("link", rel="stylesheet", href="/tree/static/tree.css"),
        el("script", src="/tree/static/tree.js", defer=True),
    )


def login_page(said: str | None = None) -> Html:
    """Asks for the key that API clients send. It is sent once, and kept in no page."""
    form = el(
        "form",
        el("h1", "thaw"),
        el("p", el("label", "The key that ", el("code", "thaw serve"), " printed, or yours", for_="key")),
        el(
            "p",
            el("input", id="key", name="key", type="password", required=True, autofocus=True, autocomplete="off"),
            el("button", "Show the sessions"),
        ),
        el("p", said, class_="warning", role="alert") if said else None,
        method="post",
        action="/tree/login",
        class_="login",
    )
    head = el("link", rel="stylesheet", href="/tree/static/tree.css")
    return document("thaw: enter a key", head, el("main", form, class_="login-page"))


# -- a file


class TreeFile:
    """A file of the whole repository, or of what led to and from a point. `path`: how the file is called, for the
    commands in it."""

    def __init__(self, repo: Repository, path: str, point: PointLike | None, codec: Codec | None) -> None:
        self._repo, self._path, self._codec = repo, path, codec
        only = None if point is None else repo.resolve(point).commit
        self._selected = only
        self._history = OutlineHistory(repo)
        self._outline = self._history.outline(kept_on_no_branch(repo), only)
        self.num_points = 0
        """Commits whose turns are in it."""

    @property
    def num_commits(self) -> int:
        return self._outline.num_commits

    def html(self) -> Html:
        """At most `FILE_NBYTES` in UTF-8, whatever the repository holds. Raises what reading it raises."""
        rows = RowMaker(
            self._outline,
            self._history,
            link=lambda point: f"#{point}",
            command=self._command,
            selected=self._selected,
        )
        stored = None if self._repo.namespace else self._repo.store.usage().blob_nbytes
        totals = parts.totals(self._outline, stored)
        if not self._outline.commits:
            return self._whole(totals, empty_tree(), Html())
        room = FILE_NBYTES - SPARE - len(self._whole(totals, Html(), Html()).encode())
        tree, unfolded = rows.first_tree(min(parts.TREE_NBYTES, room))
        points = self._points(list(self._order(unfolded)), room - len(tree.encode()))
        return self._whole(totals, tree, points)

    def _whole(self, totals: Html, tree: Html, points: Html) -> Html:
        style, script = static("tree.css"), static("tree.js")
        without = el("noscript", "Without JavaScript only the list of sessions is shown.")
        detail = el("p", without, class_="hint", data_said=KEYS)
        foot = join(f"The turns of {self.num_points:,} of {self.num_commits:,} commits are in this file.")
        title = title_of(self._repo)
        return document(
            title,
            join(
                el("meta", http_equiv="Content-Security-Policy", content=file_policy(style, script)),
                el("meta", name="referrer", content="no-referrer"),
                el("style", Html(style)),
            ),
            join(frame(title, totals, tree, detail, foot=foot), points, el("script", Html(script))),
            data_mode="file",
            data_command=self._command("POINT"),
        )

    def _command(self, point: str) -> str:
        return f"thaw show {point} --html {shlex.quote(self._path)}"

    def _order(self, unfolded: parts.Unfolded) -> Iterator[CommitId]:
        """Whose turns are put in first: the chosen one, ends of sessions that are shown, then what led to them."""
        if self._selected is not None:
            yield self._selected
        sessions = []
        for parent, num in unfolded.shown.items():
            children = self._outline.roots if parent is None else self._outline.session(parent).children
            sessions += [self._outline.session(child) for child in children[:num]]
        yield from (session.tip for session in sessions)
        for session in sessions:
            yield from session.commits[-2 : -parts.COMMITS - 1 : -1]

    def _points(self, order: list[CommitId], room: int) -> Html:
        """`template` elements of as many points as there is room for; each turn once, whoever has it."""
        made: list[Html] = []
        for one in order:
            away = self._outline.commits[one]
            if away.only_on:
                said = el("template", parts.not_fetched(self._outline, away), id=f"p-{short(one, ID_DIGITS)}")
                if len(said.encode()) <= room:
                    made.append(said)
                    room -= len(said.encode())
        turns: dict[tuple[object, ...], str] = {}
        lists: set[CommitId] = set()
        for commit in dict.fromkeys(order):
            new: dict[tuple[object, ...], Html] = {}
            if self._outline.commits[commit].only_on:
                continue
            try:
                point = read_point(self._repo, short(commit, ID_DIGITS), self._codec)
            except Damaged as error:
                inside = parts.problem(error)
            else:
                new = self._new_turns(point, turns)
                inside = self._inside(point, commit, turns | {key: f"t{len(turns) + i}" for i, key in enumerate(new)})
            added = [
                *self._new_lists(commit, lists),
                *(el("template", turn, id=f"t{len(turns) + i}") for i, turn in enumerate(new.values())),
                el("template", inside, id=f"p-{short(commit, ID_DIGITS)}"),
            ]
            nbytes = sum(len(one.encode()) for one in added)
            if nbytes <= room:
                room -= nbytes
                made += added
                lists.add(self._outline.first_of(commit))
                turns |= {key: f"t{len(turns) + i}" for i, key in enumerate(new)}
                self.num_points += 1
        return each(made)

    def _new_turns(self, point: PointShown, known: Mapping[tuple[object, ...], str]) -> dict[tuple[object, ...], Html]:
        """Those that no point before it had; later ones get room first."""
        room = FragmentRoom(num_characters=24_000, num_tokens=600, turn_characters=6_000)
        new = [turn for turn in reversed(point.turns) if turn.key not in known]
        made = {turn.key: parts.turn_part(turn, point.name, room) for turn in new}
        return dict(reversed(made.items()))

    def _new_lists(self, commit: CommitId, known: Collection[CommitId]) -> list[Html]:
        """The list of the session's commits, where it has more than one and no point before it had it."""
        first = self._outline.first_of(commit)
        if first in known:
            return []
        found = parts.commit_list(self._outline, self._outline.session(first), None, lambda other: f"#{other}")
        return [] if found is None else [el("template", found, id=f"c-{short(first, ID_DIGITS)}")]

    def _inside(self, point: PointShown, commit: CommitId, turns: Mapping[tuple[object, ...], str]) -> Html:
        name = short(commit, ID_DIGITS)
        first = self._outline.first_of(commit)
        several = len(self._outline.session(first).commits) > 1
        return join(
            parts.point_head(point, self._outline.names.get(commit, ()), parts.where(self._outline, commit)),
            el("p", el("button", "Compare with …", type="button", class_="compare", data_point=name), class_="actions"),
            el("p", data_turn=f"c-{short(first, ID_DIGITS)}") if several else None,
            parts.legend(point.turns),
            *(el("p", data_turn=turns[turn.key]) for turn in point.turns),
        )


def file_policy(style: str, script: str) -> str:
    """Nothing runs and nothing is loaded but these two."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "form-action 'none'; base-uri 'none'"
    )


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
