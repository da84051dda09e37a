"""OpenAI's Conversations: `/v1/conversations`. A conversation is a branch that its responses move, one at a time. Its
items are listed, not edited."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from thaw.core.errors import NotFound
from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects import response_input
from thaw.gateway.dialects.pages import listed
from thaw.gateway.fields import Fields
from thaw.gateway.ledger import LedgerRow
from thaw.gateway.problems import ApiError, invalid
from thaw.gateway.reply import as_json
from thaw.repo.bridge import call
from thaw.repo.resolve import ResolvedPoint

KIND = "conversation"


class ConversationCreate(msgspec.Struct, kw_only=True):
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    items: tuple[dict[str, Any], ...] = ()


FIELDS = Fields(taken=ConversationCreate)


def branch_of(id: str) -> str:
    return f"conversations/{id}"


async def create(context: GatewayContext, request: Request, body: bytes) -> Response:
    context.service.require_bytes(context.tenant)
    asked, _ = FIELDS.read(body or b"{}")
    id = f"conv_{secrets.token_hex(16)}"
    items = response_input.items(list(asked.items), id)
    response_input.messages(items)
    record = {"metadata": asked.metadata, "created_at": int(time.time()), "items": items, "instructions": None}
    row = LedgerRow(kind=KIND, id=id, namespace=context.tenant.namespace, status="completed", record=record)
    await call(context.service.ledger.put, row)
    return as_json(_shown(row))


def _shown(row: LedgerRow) -> dict[str, object]:
    record = row.record
    return {
        "id": row.id, "object": "conversation", "created_at": record["created_at"], "metadata": record["metadata"]
    }  # fmt: skip


async def _row(context: GatewayContext, id: str) -> LedgerRow:
    row = await call(context.service.ledger.get, context.tenant.namespace, KIND, id[:100])
    if row is None:
        raise ApiError(404, f"there is no conversation {id[:100]!r}", param="conversation")
    return row


async def retrieve(context: GatewayContext, request: Request, body: bytes) -> Response:
    return as_json(_shown(await _row(context, request.path_params["id"])))


async def update(context: GatewayContext, request: Request, body: bytes) -> Response:
    row = await _row(context, request.path_params["id"])
    asked, _ = FIELDS.read(body)
    if asked.items:
        raise invalid("items", "items cannot be edited; create a response instead")

    def change(now: LedgerRow) -> None:
        now.record["metadata"] = asked.metadata

    changed = await call(context.service.ledger.change, row.namespace, KIND, row.id, change)
    return as_json(_shown(changed or await _row(context, row.id)))


async def delete(context: GatewayContext, request: Request, body: bytes) -> Response:
    """Refused while a response continues with it."""
    row = await _row(context, request.path_params["id"])
    context.service.take_conversation(row.namespace, row.id)
    try:
        with contextlib.suppress(NotFound):
            await context.service.within(context.tenant).delete_branch(branch_of(row.id))
        await call(context.service.ledger.delete, row.namespace, KIND, row.id)
    finally:
        context.service.free_conversation(row.namespace, row.id)
    return as_json({"id": row.id, "object": "conversation.deleted", "deleted": True})


async def items(context: GatewayContext, request: Request, body: bytes) -> Response:
    row = await _row(context, request.path_params["id"])
    return as_json(listed(request, row.record["items"]))


# -- for responses


async def taken(context: GatewayContext, given: str | dict[str, Any] | None) -> LedgerRow | None:
    """The conversation that a response belongs to. Until it is freed nobody else continues or deletes it, so it is
    taken before it is read. Raises `ApiError`."""
    if given is None:
        return None
    id = given if isinstance(given, str) else given.get("id")
    if not isinstance(id, str):
        raise invalid("conversation", "an id, or an object with one")
    try:
        context.service.take_conversation(context.tenant.namespace, id)
    except ApiError:
        await _row(context, id)
        raise
    try:
        return await _row(context, id)
    except BaseException:
        context.service.free_conversation(context.tenant.namespace, id)
        raise


def free(context: GatewayContext, row: LedgerRow | None) -> None:
    if row is not None:
        context.service.free_conversation(row.namespace, row.id)


async def tip(context: GatewayContext, row: LedgerRow) -> tuple[ResolvedPoint | None, list[dict[str, Any]]]:
    """Where it stands; before its first response nowhere, with the items that it was made with."""
    try:
        return await context.service.point(context.tenant, branch_of(row.id)), []
    except NotFound:
        return None, list(row.record["items"])


async def extend(
    context: GatewayContext,
    row: LedgerRow,
    given: list[dict[str, Any]],
    output: list[dict[str, Any]],
    instructions: str | None,
) -> None:
    def change(now: LedgerRow) -> None:
        now.record["items"] = [*now.record["items"], *given, *output]
        now.record["instructions"] = instructions

    await call(context.service.ledger.change, row.namespace, KIND, row.id, change)
