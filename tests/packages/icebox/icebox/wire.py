"""Every verb of the contract that the server knows: the types of its arguments, and of its answer."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import msgspec

from thaw.core.identity import ModelIdentity
from thaw.core.objects import Chat
from thaw.engines.base import (
    Captured,
    CapturePlan,
    Completion,
    EngineInfo,
    GenerateRequest,
    Hydrated,
    HydratePlan,
    SessionRef,
    SessionView,
)

VERBS: dict[str, tuple[dict[str, Any], Any]] = {
    "info": ({}, EngineInfo),
    "identity": ({}, ModelIdentity),
    "open": ({"seed": int | None, "salt": str | None, "share_prefix": bool}, SessionRef),
    "append": (
        {"session": SessionRef, "token_ids": list[int], "text": str, "role": str | None, "chat": Chat | None},
        SessionView,
    ),
    "generate": ({"requests": list[GenerateRequest]}, list[Completion]),
    "capture": ({"session": SessionRef, "plan": CapturePlan}, Captured),
    "hydrate": ({"plan": HydratePlan}, Hydrated),
    "fork": (
        {"session": SessionRef, "n": int, "at": int | None, "replay": bool, "seeds": list[int] | None},
        list[SessionRef],
    ),
    "view": ({"session": SessionRef}, SessionView),
    "park": ({"session": SessionRef}, SessionView),
    "set_policy": ({"version": str}, None),
    "update_weights": ({"source": str}, None),
    "close_session": ({"session": SessionRef}, None),
}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, PurePath) else int(value)


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=_plain)


def _u64(kind: type, value: Any) -> Any:
    return kind(value)


def decode(data: bytes, kind: Any) -> Any:
    return msgspec.json.decode(data, type=kind, dec_hook=_u64)
