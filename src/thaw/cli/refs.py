"""What `thaw branch` and `thaw tag` share: they list, make, rename and delete refs of their kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from thaw.cli import light, output, place, view, words
from thaw.core.ids import short

if TYPE_CHECKING:
    from thaw.repo.repository import Repository
    from thaw.store import Ref

Kind = Literal["branch", "tag"]
What = Literal["make", "delete", "rename"]


def act(kind: Kind, named: str | None, names: tuple[str, ...], what: What, as_json: bool) -> None:
    """Do it and say it; without names the list. --json prints the refs it concerned."""
    _check(kind, names, what)
    if names:
        place.require_sessions()
    with place.open_repository(named) as repo:
        if not names:
            return _list(repo, kind, as_json)
        done, said = _do(repo, kind, names, what)
    if as_json:
        output.print_json({_plural(kind): [_plain(ref) for ref in done]})
    else:
        output.line(said)


def _check(kind: Kind, names: tuple[str, ...], what: What) -> None:
    if what == "rename" and len(names) != 2:
        raise light.usage("-m takes the old name and the new name.")
    if what == "delete" and not names:
        raise light.usage(f"-d takes the names of the {_plural(kind)} to delete.")
    if what == "make" and len(names) > 2:
        raise light.usage(f"{kind} takes a name and a point; got {len(names)} arguments.")


def _do(repo: Repository, kind: Kind, names: tuple[str, ...], what: What) -> tuple[list[Ref], str]:
    if what == "rename":
        return [repo.rename(*names)], f"{names[0]} is now {names[1]}"
    if what == "delete":
        delete = repo.delete_branch if kind == "branch" else repo.delete_tag
        gone = [delete(name) for name in names]
        return gone, "\n".join(f"deleted {kind} {ref.name} (was {short(ref.target)})" for ref in gone)
    ref = (repo.branch if kind == "branch" else repo.tag)(*names)
    return [ref], f"{kind} {ref.name} is at {short(ref.target)}"


def _list(repo: Repository, kind: Kind, as_json: bool) -> None:
    refs, head = (repo.branches(), repo.store.head) if kind == "branch" else (repo.tags(), None)
    if as_json:
        extra = {} if head is None else {"head": head}
        output.print_json({**extra, _plural(kind): [_plain(ref) for ref in refs]})
    elif not refs:
        output.note(f"no {_plural(kind)} yet.")
    else:
        output.rows([_row(repo, ref, ref.name == head) for ref in refs])


def _row(repo: Repository, ref: Ref, current: bool) -> tuple[str, ...]:
    from thaw.core.objects import Commit, State

    commit = repo.store.get_as(ref.target, Commit)
    tokens = repo.store.get_as(commit.state, State).num_tokens
    name = output.style(f"* {ref.name}", "bold", "green") if current else f"  {ref.name}"
    tail = f"{words.count(tokens, 'token')}, {words.age(int(commit.time_ns))}"
    return name, view.commit_id(ref.target), output.style(tail, "dim"), output.one_line(commit.message, 60)


def _plain(ref: Ref) -> dict[str, str]:
    return {"name": ref.name, "commit": ref.target}


def _plural(kind: Kind) -> str:
    return "branches" if kind == "branch" else "tags"
