"""The engine's mail, looked at from the client's side: the same folder, or no session can be captured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from thaw.core.errors import InvalidRequest, NotFound
from thaw.engines.served import protocol
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.served.protocol import EngineFacts


def shared_mail(said: Mapping[str, str], who: str, advice: str = "") -> tuple[Mailbox, EngineFacts]:
    """What the engine `who` said of its mail (`mail`, `pid`), checked here. Raises `NotFound` where that folder is not
    this engine's, `InvalidRequest` where it speaks another version."""
    folder = Path(said["mail"])
    mail = Mailbox(folder) if (folder / "facts").is_dir() else None
    facts = mail.engine_facts() if mail is not None else None
    if mail is None or facts is None or str(facts.pid) != said.get("pid", str(facts.pid)):
        raise NotFound(
            f"{who} keeps its mail in {folder}, which is not there on this machine: client and "
            f"engine must run on one host, or share that folder and the store{advice}"
        )
    if facts.protocol != protocol.VERSION:
        raise InvalidRequest(
            f"{who} speaks version {facts.protocol} of thaw's protocol, this client "
            f"{protocol.VERSION}; install the same thaw on both sides (there: {facts.thaw})"
        )
    return mail, facts
