"""The forms of the tree's pages. They work without the page's script; each carries the login's CSRF token."""

from __future__ import annotations

from collections.abc import Sequence

from thaw.core.ids import short
from thaw.tree.details import PointShown
from thaw.tree.markup import Html, Piece, el, join
from thaw.tree.parts import ID_DIGITS

FORGOTTEN = 100
"""Names of one commit among which to choose what is forgotten."""


def actions(
    point: PointShown, names: Sequence[str], csrf: str, branches: Sequence[str], compare: Html, seen: int
) -> Html:
    """What can be done from a point. `seen`: when the branches were read, in ns."""
    here = point.name
    commit = short(point.shown.point.commit, ID_DIGITS)
    return el(
        "div",
        compare,
        _form("fork", "Fork …", csrf, _fork(here)),
        _form("adopt", "Adopt …", csrf, _adopt(commit, branches, seen)) if point.shown.point.at_end else None,
        _form("tag", "Tag …", csrf, _tag(commit)) if point.shown.point.at_end else None,
        _form("forget", "Forget …", csrf, _forget(commit, names)),
        class_="actions",
    )


def _form(act: str, title: str, csrf: str, content: Html) -> Html:
    form = el(
        "form",
        el("input", type="hidden", name="csrf", value=csrf),
        content,
        method="post",
        action=f"/tree/{act}",
        class_="action",
    )
    return el("details", el("summary", title), form)


def _field(label: str, name: str, *, required: bool = True, **attributes: str | int | bool | None) -> Html:
    return el("label", label, " ", el("input", name=name, required=required, autocomplete="off", **attributes))


def _line(*content: Piece) -> Html:
    return el("p", *content)


def _fork(point: str) -> Html:
    said = "Each child continues with this text (in a conversation: the user's next message)"
    return join(
        _line(_field("from", "point", value=point, size=28)),
        el("label", said, el("textarea", name="prompt", maxlength=100_000)),
        _line(
            _field("children", "n", type="number", min=1, max=16, value=2),
            _field("tokens each", "max_tokens", type="number", min=1, max=4096, value=64),
            _field("temperature", "temperature", type="number", min=0, max=100, step="any", value=1),
            _field("branches", "name", required=False, placeholder="fork", size=10),
        ),
        _line(el("button", "Fork")),
    )


def _adopt(commit: str, branches: Sequence[str], seen: int) -> Html:
    listed = el("datalist", *(el("option", value=name) for name in branches[:50]), id="branches")
    branch = "main" if "main" in branches or not branches else branches[0]
    return join(
        el("input", type="hidden", name="point", value=commit),
        el("input", type="hidden", name="seen", value=seen),
        _line(_field("The branch that moves here", "branch", value=branch, list="branches"), listed),
        _line(el("button", "Adopt")),
    )


def _tag(commit: str) -> Html:
    return join(
        el("input", type="hidden", name="point", value=commit),
        _line(_field("The tag's name", "name"), el("button", "Tag")),
    )


def _forget(commit: str, names: Sequence[str]) -> Html:
    options = [el("option", name, value=_what(name)) for name in names[:FORGOTTEN]] or [
        el("option", "this response", value="response:")
    ]
    return join(
        el("input", type="hidden", name="point", value=commit),
        _line(el("label", "What ", el("select", *options, name="what")), el("button", "Forget")),
    )


def _what(name: str) -> str:
    if name.startswith("tag: "):
        return f"tag:{name.removeprefix('tag: ')}"
    return f"branch:{name.removeprefix('HEAD -> ')}"


def logout(csrf: str) -> Html:
    return el(
        "form",
        el("input", type="hidden", name="csrf", value=csrf),
        el("button", "Log out"),
        method="post",
        action="/tree/logout",
        class_="account",
    )
