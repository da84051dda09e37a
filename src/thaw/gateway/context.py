"""What a handler gets beside the request: the service, and whose request it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from thaw.engines.base import Codec
from thaw.gateway.dialects.common import Extension
from thaw.gateway.problems import invalid
from thaw.gateway.service import Service
from thaw.gateway.tenants import Tenant
from thaw.repo.resolve import ResolvedPoint


@dataclass
class GatewayContext:
    """Of one request. `key_id` names the key in logs; `noted` is what its audit line says: counts and ids, no text."""

    service: Service
    tenant: Tenant
    key_id: str
    headers: dict[str, str]
    noted: dict[str, object] = field(default_factory=dict)

    @property
    def codec(self) -> Codec:
        return self.service.engine.codec

    def extension(self, given: Extension) -> Extension:
        """With what headers say where the body says nothing."""
        return Extension(
            point=given.point or self.headers.get("x-thaw-point"),
            turn=given.turn,
            token=given.token,
            branch=given.branch or self.headers.get("x-thaw-branch"),
            note=given.note,
            keep_sampled=given.keep_sampled,
            policy=given.policy,
        )

    async def at(self, extension: Extension, standing: str | None = None) -> ResolvedPoint | None:
        """Where a request continues: the point that it names, else `standing`, after so many turns or tokens."""
        name = extension.point or standing
        if name is None:
            if extension.turn is not None or extension.token is not None:
                raise invalid("thaw", "turn and token need a point")
            return None
        return await self.service.point(self.tenant, name, turn=extension.turn, token=extension.token)

    def note(self, **values: object) -> None:
        self.noted |= values
