"""Lists in OpenAI's form, a page at a time."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from thaw.gateway.problems import ApiError, invalid


def number(request: Request, name: str, default: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not given.isascii() or not given.isdecimal() or len(given) > 12:
        raise invalid(name, "a whole number")
    return int(given)


def listed(request: Request, items: list[dict[str, Any]]) -> dict[str, object]:
    """A page of items, newest first unless asked otherwise."""
    limit = number(request, "limit", 20)
    if not 1 <= limit <= 100:
        raise invalid("limit", f"{limit}; 1 to 100")
    ordered = items if request.query_params.get("order") == "asc" else items[::-1]
    after = request.query_params.get("after")
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise ApiError(404, f"there is no item {after[:100]!r}", param="after")
        ordered = ordered[ids.index(after) + 1 :]
    page = ordered[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": "", "last_id": ""}
    return {"object": "list", "data": page, "has_more": len(ordered) > limit, **ends}
