"""`/v1/models`: the one model of the engine, in a form that both SDKs read."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from thaw.gateway.context import GatewayContext
from thaw.gateway.problems import ApiError
from thaw.gateway.reply import as_json


def _model(context: GatewayContext, name: str) -> dict[str, object]:
    limit = context.service.engine.info.max_model_len
    return {
        "id": name, "object": "model", "type": "model", "created": 0, "created_at": "1970-01-01T00:00:00Z",
        "display_name": name, "owned_by": "thaw", "max_model_len": limit, "max_input_tokens": limit,
        "max_tokens": limit,
    }  # fmt: skip


async def listed(context: GatewayContext, request: Request, body: bytes) -> Response:
    names = [name for name in context.service.served if name != "*"] or [context.service.model]
    data = [_model(context, name) for name in names]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
    return as_json({"object": "list", "data": data, "has_more": False, **ends})


async def retrieve(context: GatewayContext, request: Request, body: bytes) -> Response:
    name = request.path_params["id"]
    if name not in context.service.served and name != context.service.model:
        raise ApiError(404, f"there is no model {name[:100]!r} here", code="model_not_found")
    return as_json(_model(context, name))
