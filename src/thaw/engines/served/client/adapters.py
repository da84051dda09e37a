"""Which adapters the engine has, and what each of them is: by its content, whatever it is called."""

from __future__ import annotations

import asyncio
from pathlib import Path

from thaw.core.errors import InvalidRequest, NotFound, ThawError, Unsupported
from thaw.core.ids import is_id
from thaw.engines.hf import adapter
from thaw.engines.served.client.transport import ServedAdapter, Transport

MAX_NAME = 100


class ClientAdapters:
    """On the loop. What is known of a folder is looked at again when its files were written anew."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._known: dict[str, tuple[object, str]] = {}
        self._served: dict[str, ServedAdapter] = {}

    async def listed(self) -> dict[str, str]:
        """Name -> id, of those whose files can be read."""
        found = {}
        for name, folder in (await self._transport.adapters()).items():
            try:
                found[name] = await self._look(folder)
            except ThawError:
                continue  # one that no session can be opened with; whoever names it is told
            self._served[found[name]] = ServedAdapter(name, folder, found[name])
        return found

    async def find(self, wanted: str) -> ServedAdapter:
        """The adapter of that name, or of that id under any name. Raises `NotFound`, `Unsupported`."""
        self._require_any()
        if not is_id(wanted):
            served = await self._transport.adapters()
            if wanted in served:
                return ServedAdapter(wanted, served[wanted], await self._look(served[wanted]))
            raise NotFound(
                f"this engine has no adapter {wanted!r}; it has {', '.join(map(repr, sorted(served))) or 'none'}. Load "
                f"it (engine.load_adapter({wanted!r}, FOLDER))"
            )
        ids = await self.listed()
        if wanted not in ids.values():
            known = ", ".join(f"{name!r} ({one[:19]}…)" for name, one in sorted(ids.items()))
            raise NotFound(f"this engine has no adapter {wanted}; it has {known or 'none'}. Load it (load_adapter)")
        return self._served[wanted]

    async def id_of(self, wanted: str) -> str:
        """The id of the adapter of that name. An id is taken as it is: what was computed under an adapter outlasts it
        in the engine."""
        self._require_any()
        return wanted if is_id(wanted) else (await self.find(wanted)).id

    async def of_session(self, wanted: str | None) -> ServedAdapter | None:
        """How a request of a session is to name its adapter."""
        if wanted is None:
            return None
        return self._served.get(wanted) or await self.find(wanted)

    def forget_name(self, wanted: str) -> None:
        """The server calls something else so by now, or nothing: it is looked for again."""
        self._served.pop(wanted, None)

    async def load(self, name: str, folder: Path) -> str:
        """Have the engine load a copy of the adapter in `folder`, which nobody writes to; its id."""
        self._require_any()
        if not name or len(name) > MAX_NAME or is_id(name):
            raise InvalidRequest(f"adapter name {name[:MAX_NAME]!r}: must be 1 to {MAX_NAME} characters, and no id")
        found, place = await asyncio.to_thread(adapter.kept_copy, folder, self._transport.mail.adapters)
        await self._transport.load_adapter(name, str(place))
        self._served[found] = ServedAdapter(name, str(place), found)
        return found

    def _require_any(self) -> None:
        facts = self._transport.facts
        if not facts.max_adapters:
            raise Unsupported(
                f"this {facts.engine} runs no adapters: start it with enable_lora=True (--enable-lora), and, where an "
                "adapter's rank is above 16, a larger max_lora_rank"
            )

    async def _look(self, folder: str) -> str:
        now, known = adapter.signature(Path(folder)), self._known.get(folder)
        if known is None or known[0] != now:
            known = self._known[folder] = now, await asyncio.to_thread(adapter.id_of, Path(folder))
        return known[1]
