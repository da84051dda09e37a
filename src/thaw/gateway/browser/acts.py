"""What can be done from the tree: fork, adopt, tag, forget. Each is one form, and says what came of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import msgspec

from thaw.core.errors import InvalidRequest, RefConflict
from thaw.core.ids import short
from thaw.core.sampling import Sampling
from thaw.core.text import one_line
from thaw.gateway.asked import Asked
from thaw.gateway.context import GatewayContext
from thaw.gateway.problems import invalid
from thaw.gateway.reply import begun
from thaw.repo import refs
from thaw.repo.bridge import call
from thaw.repo.children import free_name
from thaw.repo.repository import Repository
from thaw.repo.resolve import ResolvedPoint
from thaw.tree.parts import ID_DIGITS
from thaw.tree.words import count

Form = Mapping[str, str]
CHILDREN = 16
"""Of one fork, at most."""
TOKENS = 4096
"""Of one child, at most."""
SOON_S = 1.0
"""How long a fork waits for what fails at once."""


class ActOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """`at`: the commit to show next, if it is still in the tree; None: it is not."""

    said: str
    at: str | None


async def fork(context: GatewayContext, form: Form) -> ActOutcome:
    """N children that continue from a point, each a job of its own and a branch `NAME/0` …"""
    service, repo = context.service, context.service.within(context.tenant)
    point = await repo.resolve(_named(form, "point"))
    num = _number(form, "n", 1, CHILDREN)
    sampling = Sampling(temperature=_decimal(form, "temperature", 0.0, 100.0), logprobs=2)
    prompt = form.get("prompt", "").replace("\r\n", "\n")
    base = msgspec.structs.replace(
        await call(_asked, context, repo.sync, point, prompt),
        sampling=sampling,
        max_tokens=_number(form, "max_tokens", 1, TOKENS),
        note=one_line(prompt, 72) or "continued",
    )
    names = await _free_names(context, repo.sync, form.get("name", "").strip() or None, num)
    jobs = await service.start(context.tenant, [msgspec.structs.replace(base, branch=name) for name in names])
    await begun(jobs)
    done, _ = await asyncio.wait([job.outcome for job in jobs], timeout=SOON_S)
    for one in done:
        one.result()
    context.note(children=num)
    listed = names[0] if num == 1 else f"{names[0]} … {names[-1]}"
    return ActOutcome(said=f"{count(num, 'child', 'children')}: {listed}", at=short(point.commit, ID_DIGITS))


async def _free_names(context: GatewayContext, repo: Repository, wanted: str | None, num: int) -> list[str]:
    """The children's branches: taken neither by a ref nor by a request that is under way, which makes its branch when
    it ends. Nothing else runs between this and what follows it in the event loop."""
    under_way = _under_way(context)
    prefix, number = await call(free_name, repo, wanted, num), 1
    while clash := (under_way | _under_way(context)) & {f"{prefix}/{i}" for i in range(num)}:
        if wanted is not None:
            raise invalid("name", f"{min(clash)} is being generated; choose another name")
        number += 1
        with contextlib.suppress(InvalidRequest):
            prefix = await call(free_name, repo, f"fork{number}", num)
    return [f"{prefix}/{i}" for i in range(num)]


def _under_way(context: GatewayContext) -> set[str]:
    return {job.asked.branch or "" for job in context.service.running_in(context.tenant.namespace)}


def _asked(context: GatewayContext, repo: Repository, point: ResolvedPoint, prompt: str) -> Asked:
    """In a conversation the prompt is the user's next message; in plain text it is appended as it is."""
    shown = repo.show(point)
    if shown.turns and all(turn.role is not None for turn in shown.turns):
        if not prompt.strip():
            raise invalid("prompt", "a conversation continues with a message of the user's")
        return Asked(messages=({"role": "user", "content": prompt},), at=point)
    news = context.codec.encode(prompt, first=not shown.tokens) if prompt else []
    return Asked(token_ids=(*shown.tokens, *news), text=prompt, at=point)


async def adopt(context: GatewayContext, form: Form) -> ActOutcome:
    """Move a branch; not where it moved since the form was made, at `seen` (ns)."""
    repo = context.service.within(context.tenant)
    point, branch = _named(form, "point"), _named(form, "branch")
    if form.get("seen"):
        await call(_require_unmoved, repo.sync, branch, _number(form, "seen", 0, 1 << 63))
    ref = await repo.adopt(point, branch)
    return ActOutcome(said=f"{ref.name} is at {short(ref.target)} now", at=short(ref.target, ID_DIGITS))


def _require_unmoved(repo: Repository, branch: str, since: int) -> None:
    last = next((move for move in repo.store.reflog(branch, limit=100) if move.moved), None)
    if last is not None and last.time_ns > since:
        now = "deleted" if last.new is None else f"moved to {short(last.new)}"
        raise RefConflict(f"{branch} was {now} after this page showed it; nothing was changed. Look again, then adopt.")


async def tag(context: GatewayContext, form: Form) -> ActOutcome:
    repo = context.service.within(context.tenant)
    ref = await repo.tag(_named(form, "name"), _named(form, "point"))
    return ActOutcome(said=f"{ref.name} names {short(ref.target)}", at=short(ref.target, ID_DIGITS))


async def forget(context: GatewayContext, form: Form) -> ActOutcome:
    """Delete a branch or a tag that is at this commit; or what the gateway keeps of a commit that has no name."""
    repo = context.service.within(context.tenant)
    point = await repo.resolve(_named(form, "point"))
    what, _, name = form.get("what", "").partition(":")
    if what == "branch" or what == "tag":
        await call(refs.delete, repo.sync.store, name, what, point.commit)
        said = f"{what} {name} is forgotten; `thaw undo {name}` brings it back"
    elif what == "response":
        rows = await call(context.service.ledger.points, context.tenant.namespace)
        its = [(kind, id) for kind, id, commit in rows if commit == point.commit]
        if not its:
            raise invalid("what", "the gateway keeps no response of this commit; nothing was forgotten")
        for kind, id in its:
            await call(context.service.ledger.delete, context.tenant.namespace, kind, id)
        said = "the response is forgotten"
    else:
        raise invalid("what", "choose what to forget: a branch, a tag or the response")
    said += ". KV that nothing else needs goes with a later gc."
    return ActOutcome(said=said, at=short(point.commit, ID_DIGITS))


ACTS = {"fork": fork, "adopt": adopt, "tag": tag, "forget": forget}


def _named(form: Form, field: str) -> str:
    value = form.get(field, "").strip()
    if not value:
        raise invalid(field, "it is empty")
    return value


def _number(form: Form, field: str, least: int, most: int) -> int:
    text = form.get(field, "")
    if not text.isascii() or not text.isdecimal() or len(text) > 19 or not least <= int(text) <= most:
        raise invalid(field, f"a whole number from {least} to {most}")
    return int(text)


def _decimal(form: Form, field: str, least: float, most: float) -> float:
    try:
        value = float(form.get(field, ""))
    except ValueError:
        value = -1.0
    if not least <= value <= most:
        raise invalid(field, f"a number from {least:g} to {most:g}")
    return value
