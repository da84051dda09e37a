"""The tree's values as fragments of HTML: rows of sessions, one point in full, two points side by side.

A fragment is the same in a server's page, in an answer to the page's script, and in a file. Its size is bounded: rows
by `Unfolded`, texts and tokens by `FragmentRoom`; what is left out is counted, and the command that shows it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from thaw.core.errors import ThawError
from thaw.core.ids import CommitId, short
from thaw.core.text import one_line
from thaw.repo.diff import Diff, Side
from thaw.tree import words
from thaw.tree.details import LIKELY, SURE, PointShown, TokenShown, TurnShown
from thaw.tree.markup import Html, each, el, join, text
from thaw.tree.outline import Outline, OutlineCommit, OutlineHistory, OwnPart, TreeSession

ROWS = 120
"""Sessions of a first page."""
MORE = 50
"""Sessions that one more click shows."""
LEVELS = 200
"""Of the tree, that a page is sent at once: browsers flatten markup that is nested deeper than 512."""
NAMES = 4
"""Names of a session that are shown."""
HEAD_NAMES = 20
"""Names of a chosen point that are shown."""
TREE_NBYTES = 180_000
"""Of the rows of a first page, at most; fewer sessions are shown where names and messages are long."""
ROLES = 6
"""Of a prompt's messages, that are listed."""
LONG_NAME = 24
"""Characters of a name from which a row may cut it; the whole is in its title."""
COMMITS = 50
"""Commits of a session that are listed."""
ID_DIGITS = 16
MESSAGE = 90
RUNNING = 12
"""Requests under way that are shown."""
TAIL = 1_000
"""Characters of their text in the page; the script follows all of it."""
TAIL_NBYTES = 4_000
"""Of that text as markup, at most."""


class LivingShown(msgspec.Struct, frozen=True, kw_only=True):
    """A commit whose KV is in an engine now. `num_running`: requests that run from there; `memories`: where in it."""

    num_running: int
    memories: tuple[str, ...]


Living = Mapping[CommitId, LivingShown]


class Unfolded(msgspec.Struct, frozen=True, kw_only=True):
    """Which sessions are shown: of each parent (None: the roots) the first so many; others are folded."""

    shown: Mapping[CommitId | None, int]

    @property
    def num_rows(self) -> int:
        return sum(self.shown.values())


def unfold(outline: Outline, budget: int = ROWS) -> Unfolded:
    """What a first page shows: level by level, so that no branch takes the room of all others."""
    shown: dict[CommitId | None, int] = {}
    level: list[CommitId | None] = [None]
    left = budget
    while level and left > 0:
        below: list[CommitId | None] = []
        for number, parent in enumerate(level):
            children = outline.roots if parent is None else outline.session(parent).children
            fair = max(MORE // 2, left // (2 * (len(level) - number)))
            num = min(len(children), left, fair)
            if num:
                shown[parent] = num
                left -= num
                below += children[:num]
        level = below
    return Unfolded(shown=shown)


def unfold_again(
    outline: Outline, wanted: Mapping[CommitId | None, int], folded: Collection[CommitId], budget: int
) -> Unfolded:
    """What somebody has before them, and what came since: all but `folded`, as far as `budget` goes. `wanted`: how many
    of a parent's are shown."""
    shown: dict[CommitId | None, int] = {}
    waiting: list[tuple[CommitId | None, int]] = [(None, 1)]
    left = budget
    for parent, level in waiting:
        children = outline.roots if parent is None else outline.session(parent).children
        num = min(len(children), left, max(wanted.get(parent, 0), MORE))
        if num:
            shown[parent] = num
            left -= num
            if level < LEVELS:
                waiting += [(child, level + 1) for child in children[:num] if child not in folded]
    return Unfolded(shown=shown)


class RowMaker:
    """Rows of one outline. `link` says where a point leads, `command` which command shows what a file leaves out (None:
    the page's script asks for it)."""

    def __init__(
        self,
        outline: Outline,
        history: OutlineHistory,
        *,
        link: Callable[[str], str],
        living: Living | None = None,
        selected: CommitId | None = None,
        command: Callable[[str], str] | None = None,
        now_s: float | None = None,
    ) -> None:
        self._outline, self._history, self._link, self._command = outline, history, link, command
        self._living = living or {}
        self._now_s = now_s
        known = selected is not None and selected in outline.commits
        self._selected = outline.first_of(selected) if known and selected is not None else None

    def tree(self, unfolded: Unfolded) -> Html:
        """The whole `ul` of a tree."""
        return el("ul", self.children(None, 0, unfolded), id="tree", role="tree", aria_label="Sessions")

    def first_tree(self, nbytes: int = TREE_NBYTES) -> tuple[Html, Unfolded]:
        """The tree of a first page, of at most `nbytes`: with fewer sessions where they need more room."""
        budget = ROWS
        while True:
            unfolded = unfold(self._outline, budget)
            made = self.tree(unfolded)
            size = len(made.encode())
            if size <= nbytes or budget == 1:
                return made, unfolded
            budget = max(1, min(budget - 1, budget * max(0, nbytes) // size))

    def children(self, parent: CommitId | None, start: int, unfolded: Unfolded) -> Html:
        """The rows under `parent` from number `start` on, built from the leaves up: no depth can overflow."""
        inside: dict[CommitId | None, Html] = {}
        for one in reversed(self._order(parent, unfolded)):
            first = start if one == parent else 0
            children = self._of(one)
            end = first + unfolded.shown.get(one, 0)
            rows = [self._row(child, inside.pop(child, None)) for child in children[first:end]]
            rest = children[end:]
            inside[one] = join(*rows, self._more(one, end, rest) if rest else None)
        return inside.get(parent, Html())

    def _order(self, parent: CommitId | None, unfolded: Unfolded) -> list[CommitId | None]:
        order: list[CommitId | None] = [parent]
        for one in order:
            order += [child for child in self._of(one)[: unfolded.shown.get(one, 0)] if child in unfolded.shown]
        return order

    def _of(self, parent: CommitId | None) -> tuple[CommitId, ...]:
        return self._outline.roots if parent is None else self._outline.session(parent).children

    def _row(self, first: CommitId, inside: Html | None) -> Html:
        session = self._outline.session(first)
        point = short(session.tip, ID_DIGITS)
        expanded = None if not session.children else "false" if inside is None else "true"
        return el(
            "li",
            el("div", self._label(session, point), class_="row"),
            self._folded(session) if inside is None else el("ul", inside, role="group"),
            id=f"s-{short(first, ID_DIGITS)}",
            role="treeitem",
            data_point=point,
            aria_expanded=expanded,
            aria_selected="true" if first == self._selected else "false",
            tabindex="-1",
        )

    def _folded(self, session: TreeSession) -> Html | None:
        """In a file, what is not in it."""
        if self._command is None or not session.children:
            return None
        here = not self._outline.commits[session.tip].only_on
        command = self._command(short(session.tip, ID_DIGITS)) if here else "thaw log --graph --all"
        said = f"{words.count(session.num_below, 'commit')} below, not in this file: "
        return el("p", said, el("code", command), class_="left-out")

    def _label(self, session: TreeSession, point: str) -> Html:
        commit = self._outline.commits[session.tip]
        if commit.only_on:
            return join(
                el("a", f"commit {short(commit.id)}, not fetched", href=self._link(point)),
                *self._names(session),
                el("small", _together(where(self._outline, commit.id))),
            )
        living = [self._living[one] for one in session.commits if one in self._living]
        running = sum(one.num_running for one in living)
        memories = sorted({memory for one in living for memory in one.memories}, reverse=True)
        part = self._history.own_part(session.tip, self._outline.base_here(session))
        return join(
            el("a", one_line(commit.message, MESSAGE) or "(no message)", href=self._link(point)),
            *self._names(session),
            el("i", words.count(running, "request") + " running", class_="running") if running else None,
            el("small", self._figures(session, part, memories), class_="live" if living else None),
        )

    def _names(self, session: TreeSession) -> list[Html]:
        shown = [
            el("b", name, class_=self._kind(name), title=name if len(name) > LONG_NAME else None)
            for name in session.names[:NAMES]
        ]
        left = len(session.names) - len(shown)
        return [*shown, el("b", f"{left} more names")] if left else shown

    def _kind(self, name: str) -> str:
        if name in self._outline.remote_names:
            return "remote"
        return "tag" if name.startswith("tag: ") else "head" if name.startswith("HEAD -> ") else "branch"

    def _figures(self, session: TreeSession, part: OwnPart, memories: Sequence[str]) -> Html:
        commit = self._outline.commits[session.tip]
        if part.nbytes is None:
            remotes = self._outline.remotes.get(session.tip, ())
            also = f"; {words.together(*(f'on {name}' for name in remotes))}" if remotes else ""
            own = [f"KV here damaged or gone: run `thaw fsck`{also}"]
        elif self._outline.base_here(session) is None and session.base in self._outline.commits:
            own = [
                self._where(session, memories),
                words.count(part.num_own, "token"),
                f"{words.nbytes(part.nbytes)} here",
            ]
        else:
            shared = [f"{part.num_shared:,} shared"] if part.num_shared else []
            own = [
                self._where(session, memories),
                words.count(part.num_own, "own token"),
                *shared,
                f"{words.nbytes(part.nbytes)} own",
            ]
        run = [words.count(len(session.commits), "commit")] if len(session.commits) > 1 else []
        told = "".join(f"{_together(part)} · " for part in [*own, *run])
        if self._now_s is None:
            return join(told, _together(words.moment(commit.time_ns)[:16]))
        age = _together(words.age(commit.time_ns, self._now_s))
        return join(told, el("time", age, datetime=words.utc(commit.time_ns)))

    def _where(self, session: TreeSession, memories: Sequence[str]) -> str:
        """Of its last commit; and which remotes have only earlier ones."""
        whole = self._outline.remotes.get(session.tip, ())
        some = [name for name in self._outline.remotes.get(session.id, ()) if name not in whole]
        partly = f", partly {words.together(*(f'on {name}' for name in some))}" if some else ""
        return where(self._outline, session.tip, memories) + partly

    def _more(self, parent: CommitId | None, start: int, rest: Sequence[CommitId]) -> Html:
        said = words.count(len(rest), "more session")
        if self._command is not None:
            where = el("code", "thaw log --graph --all")
            inside = join(f"{said}, not in this file: ", where, " lists them")
            return el("li", el("p", inside, class_="left-out"), role="treeitem", tabindex="-1")
        of = "" if parent is None else short(parent, ID_DIGITS)
        button = el("button", f"{said} …", type="button", tabindex="-1", class_="more")
        return el(
            "li", button, id=f"m-{of}", role="treeitem", tabindex="-1", data_of=of, data_start=start, class_="more"
        )  # fmt: skip


def _together(words_of_one: str) -> str:
    """Not broken over two lines."""
    return words_of_one.replace(" ", "\u00a0").replace("-", "\u2011")


def where(outline: Outline, commit: CommitId, memories: Sequence[str] = ()) -> str:
    """Where a commit's KV is: an engine's `memories`, this disk, remotes as they were last seen."""
    remotes = outline.remotes.get(commit, ())
    if outline.commits[commit].only_on:
        return f"only {words.together(*(f'on {name}' for name in remotes))}"
    return words.together(*memories, "on disk", *(f"on {name}" for name in remotes))


def _listed(names: Sequence[str]) -> str:
    left = len(names) - HEAD_NAMES
    more = f" and {words.count(left, 'more name')}" if left > 0 else ""
    return ", ".join(names[:HEAD_NAMES]) + more


def not_fetched(outline: Outline, commit: OutlineCommit) -> Html:
    """In place of a point that only a remote has: which command brings it."""
    names = outline.names.get(commit.id, ())
    branches = sorted(name.partition("/")[2] for name in names if name.startswith(f"{commit.only_on}/"))
    command = f"thaw fetch {commit.only_on} {branches[0]}" if branches else f"thaw fetch --unshallow {commit.only_on}"
    return join(
        el("h2", _listed(names) or short(commit.id), tabindex="-1"),
        el("p", f"Commit {short(commit.id, ID_DIGITS)} is {where(outline, commit.id)}, as that was last seen."),
        el("p", "Its turns and its KV were not fetched. This command brings them: ", el("code", command)),
    )


def totals(outline: Outline, stored_nbytes: int | None) -> Html:
    """The line above the tree."""
    names = [name for found in outline.names.values() for name in found if name not in outline.remote_names]
    num_tags = sum(name.startswith("tag: ") for name in names)
    num_remote, num_elsewhere = len(outline.remote_names), outline.num_elsewhere
    saved = outline.saved
    told = [
        words.count(outline.num_sessions, "session"),
        words.count(outline.num_commits, "commit"),
        words.count(len(names) - num_tags, "branch", "branches"),
        words.count(num_tags, "tag"),
        *([words.count(num_remote, "branch of a remote", "branches of remotes")] if num_remote else []),
        *([words.count(num_elsewhere, "commit") + " not fetched"] if num_elsewhere else []),
        *([] if stored_nbytes is None else [f"{words.nbytes(stored_nbytes)} of KV stored"]),
    ]
    forked = (
        f"Forking saved prefilling {words.count(saved.num_tokens, 'token')} and storing {words.nbytes(saved.nbytes)}."
        if saved.num_tokens
        else "Nothing has been forked yet."
    )
    return el("p", " · ".join(told), ". ", forked, id="totals")


# -- what is under way


class RunningShown(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is being answered. `branch`: which it will become, None: none; `note`: what it is about; `parent`:
    the commit that it continues; `tail`: the end of its text."""

    name: str
    branch: str | None
    note: str
    parent: CommitId | None
    tail: str


def running(shown: Sequence[RunningShown], link: Callable[[str], str]) -> Html:
    """Each with its text until now, folded; the page's script lets it grow."""
    left = len(shown) - RUNNING
    rows = [_running_row(one, link) for one in shown[:RUNNING]]
    more = el("p", f"and {words.count(left, 'more request')}", class_="hint") if left > 0 else None
    return el("section", *rows, more, id="running", aria_label="Requests under way")


def _running_row(one: RunningShown, link: Callable[[str], str]) -> Html:
    point = None if one.parent is None else short(one.parent, ID_DIGITS)
    where = join("after ", el("a", point, href=link(point))) if point else "in a new session"
    branch = join(el("b", one.branch), " ") if one.branch else None
    note = join(el("q", one_line(one.note, MESSAGE)), " ") if one.note else None
    said = el("summary", "running ", branch, note, where)
    return el("details", said, el("pre", _tail(one.tail), dir="auto"), data_request=one.name)


def _tail(value: str) -> Html:
    """The end of a text, as much as there is room for when it is markup."""
    while len((made := text(value)).encode()) > TAIL_NBYTES:
        value = value[len(value) // 4 + 1 :]
    return made


# -- one point


class FragmentRoom(msgspec.Struct, kw_only=True):
    """What a fragment may still hold; taken from as it is made."""

    num_characters: int = 200_000
    num_tokens: int = 3_000
    turn_characters: int = 20_000

    def text(self, value: str) -> tuple[str, str, int]:
        """(start, end, how many characters are left out between them)."""
        room = max(0, min(self.turn_characters, self.num_characters))
        if len(value) <= room:
            self.num_characters -= len(value)
            return value, "", 0
        self.num_characters -= room
        head = room - room // 4
        return value[:head], value[len(value) - (room - head) :], len(value) - room

    def tokens(self, num: int) -> bool:
        if num > self.num_tokens:
            return False
        self.num_tokens -= num
        return True


def point_head(point: PointShown, names: Sequence[str], place: str, model_name: str | None = None) -> Html:
    """What it is: names, message, figures. `place`: where its KV is; nothing where that is not known. `model_name`: how
    its model is called, where that is known."""
    shown = point.shown
    entry, model = shown.entry, shown.model
    called = f"{one_line(model_name, MESSAGE)} ({model.architecture})" if model_name else model.architecture
    inside = "" if shown.point.at_end else f" of {entry.num_tokens:,}, inside the commit"
    fields = [
        ("commit", short(entry.commit, ID_DIGITS)),
        ("made", words.moment(entry.time_ns)),
        ("length", f"{words.count(len(shown.tokens), 'token')}{inside}, {words.count(len(shown.turns), 'turn')}"),
        ("KV", f"of {words.count(shown.num_kv, 'token')}, {words.nbytes(shown.nbytes)}{place and f', {place}'}"),
        ("model", f"{called}, {model.dtype}, policy {model.policy}"),
        ("made by", f"{entry.origin.get('engine', '?')} {entry.origin.get('version', '')}".strip()),
        ("continues", "inside a completion" if shown.unfinished else f"from here, seed {shown.seed}"),
    ]
    return join(
        el("h2", _listed(names) or short(entry.commit), tabindex="-1"),
        el("p", one_line(entry.message, 400) or "(no message)", class_="message", dir="auto"),
        el("dl", *(join(el("dt", name), el("dd", value)) for name, value in fields)),
    )


def commit_list(
    outline: Outline, session: TreeSession, point: CommitId | None, link: Callable[[str], str]
) -> Html | None:
    """The commits of a session with more than one, newest first."""
    if len(session.commits) < 2:
        return None
    shown = session.commits[: -COMMITS - 1 : -1]
    rows = [
        el(
            "li",
            el(
                "a",
                f"{short(one)}: {one_line(outline.commits[one].message, 60) or '(no message)'}",
                href=link(short(one, ID_DIGITS)),
                data_point=short(one, ID_DIGITS),
                aria_current="true" if one == point else None,
            ),
            f" {outline.commits[one].num_tokens:,} tokens",
        )
        for one in shown
    ]
    left = len(session.commits) - len(shown)
    if left:
        command = el("code", f"thaw log {short(shown[-1])}~1")
        rows.append(el("li", f"{words.count(left, 'earlier commit')}: ", command, class_="left-out"))
    return el("details", el("summary", words.count(len(session.commits), "commit")), el("ul", *rows), class_="commits")


def legend(turns: Sequence[TurnShown]) -> Html | None:
    """What the colours of these turns mean."""
    tokens = [token for turn in turns for token in turn.tokens or ()]
    if not tokens:
        return None
    without = sum(token.margin is None for token in tokens)
    more = [("x", "another was likelier")] if without < len(tokens) else []
    margins = ("Margin over the next token, in nats: ", *_swatches(f"under {SURE[0]:g}", SURE, more))
    plain = (
        "Log probability" if without == len(tokens) else "Where no margin was recorded, log probability",
        ": ",
        *_swatches(f"under {LIKELY[0]:g}", LIKELY, []),
        "Margins are recorded with ",
        el("code", "--logprobs 2"),
        ".",
    )
    return el("p", *(margins if more else ()), *(plain if without else ()), class_="legend")


def _swatches(least: str, bounds: Sequence[float], more: Sequence[tuple[str, str]]) -> list[Html]:
    """Each colour with the value from which it is used."""
    said = [least, *(f"{bound:g}" for bound in bounds[:-1]), f"{bounds[-1]:g} and more"]
    named = [*more, *((f"m{i}", one) for i, one in enumerate(said))]
    return [join(el("i", one, class_=name), " ") for name, one in named]


def turn_part(turn: TurnShown, point: str, room: FragmentRoom, *, can_fork: bool = False) -> Html:
    """One turn with its text. `point`: of which it is a turn."""
    num = words.count(turn.end - turn.start, "token")
    head = f"turn {turn.number} · {_who(turn)} · {num} [{turn.start:,}, {turn.end:,})"
    if turn.kind == "completion":
        head += f" · ended by {turn.finish}" if turn.finish else " · unfinished"
    here = f"{point.partition(':')[0]}:token={turn.end}"
    fork = el("button", "fork after this turn", type="button", class_="fork-here", data_point=here)
    return el(
        "article",
        el("header", head, " ", fork if can_fork else None),
        _said(turn, point, room),
        class_=f"turn {turn.kind}",
    )


def _who(turn: TurnShown) -> str:
    """Of one message its role; of a prompt of several, all of them."""
    if len(turn.roles) > 1:
        listed = ", ".join(turn.roles[:ROLES]) + (" …" if len(turn.roles) > ROLES else "")
        return f"prompt of {len(turn.roles):,} messages: {one_line(listed, 90)}"
    return one_line(turn.role or turn.kind, 90)


def _said(turn: TurnShown, point: str, room: FragmentRoom) -> Html:
    if turn.tokens is not None and room.tokens(len(turn.tokens)):
        if any(token.text is None for token in turn.tokens):
            strip = el("p", *(_token(token) for token in turn.tokens), class_="strip", aria_label="tokens in order")
            return join(_plain(turn.text, point, room), strip)
        return el("pre", *(_token(token) for token in turn.tokens), dir="auto")
    return _plain(turn.text, point, room)


def _plain(value: str, point: str, room: FragmentRoom) -> Html:
    start, end, num = room.text(value)
    if not num:
        return el("pre", start or "(no text)", dir="auto")
    said = join(f" … {words.count(num, 'character')} left out: ", el("code", f"thaw show {point} --text"), " … ")
    return el("pre", start, el("span", said, class_="left-out"), end, dir="auto")


def _token(token: TokenShown) -> Html:
    colour = "x" if token.colour < 0 else f"m{token.colour}"
    return el("i", "\u25aa" if token.text is None else token.text, class_=colour, title=_told(token))


def _told(token: TokenShown) -> str:
    said = f"log probability {token.logprob:.2f}"
    if token.margin is None:
        return said
    if token.best is None:
        return f"{said}, {token.margin:.2f} over the next"
    return f"{said}, {-token.margin:.2f} under {one_line(token.best, 30) or 'a space'!r}"


def point_body(point: PointShown, room: FragmentRoom, *, can_fork: bool = False) -> Html:
    """Its turns. Later ones get room first: they are what a fork is about."""
    made = [turn_part(turn, point.name, room, can_fork=can_fork) for turn in reversed(point.turns)]
    return join(legend(point.turns), each(reversed(made)))


# -- two points


def diff_part(found: Diff, a: str, b: str) -> Html:
    """Where two points part, side by side."""
    common = join(
        el(
            "p", f"{words.count(found.num_common_tokens, 'common token')}, {words.nbytes(found.nbytes_shared)} shared. "
        ),
        el("pre", "… ", found.common_text_end, class_="common", dir="auto") if found.common_text_end else None,
    )
    if found.equal:
        return el("section", el("h2", "Compared"), common, el("p", "The two points are equal, token for token."))
    other = None if found.same_model else el("p", "Of different models: their KV cannot be compared.", class_="warning")
    sides = el("div", _side(found.a, a), _side(found.b, b), class_="sides")
    return el("section", el("h2", "Compared"), other, common, sides)


def _side(side: Side, name: str) -> Html:
    told = f"{words.count(side.num_own_tokens, 'own token')}, {words.nbytes(side.nbytes_own)} own"
    if side.token is None:
        told += "; ends where they part"
    elif side.logprob is not None:
        told += f"; first token {side.token}, log probability {side.logprob:.3f}"
    start, end, num = FragmentRoom().text(side.text)
    said = el("span", f" … {num:,} characters left out … ", class_="left-out") if num else None
    shown = el("pre", start or "(no text)", said, end, dir="auto")
    return el("div", el("h3", name), el("p", told), shown, class_="side")


def problem(error: ThawError) -> Html:
    """An error in place of a fragment."""
    return el("p", str(error), class_="warning", role="alert")
