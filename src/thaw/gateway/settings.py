"""How a gateway runs: where it listens, what it admits, how much it keeps."""

from __future__ import annotations

import sys

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client can cost. Beyond it a request is refused, and the rest is served."""

    body_nbytes: int = 32 << 20
    body_s: float = 30.0
    """Until a request's body must be there."""
    body_values: int = 1 << 20
    """The price of a body's JSON values (`thaw.gateway.bodies`)."""
    bodies_nbytes: int = 256 << 20
    """Of large bodies that are being read or answered."""
    head_nbytes: int = 16 << 10
    head_s: float = 10.0
    """Until a request's headers must be there."""
    stall_s: float = 60.0
    """For which a client may read nothing of a reply that waits for it."""
    connections: int = 4096
    """At once. Never more than a share of the files that the process may open."""
    requests: int = 1024
    """Running at once, including streams; further requests get a status that says to retry."""
    choices: int = 64
    """Of one request (`n`)."""
    live_sessions: int = 64
    live_tokens: int = 4 << 20
    """What stays open in the engine behind the last responses, so that the next request loads nothing."""


class Keeping(msgspec.Struct, frozen=True, kw_only=True):
    """How long responses that nobody named are kept; those of a branch or tag are kept as long as it is."""

    lifetime_s: float = 30 * 24 * 3600.0
    nbytes: int = 64 << 30
    sweep_s: float = 600.0


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """`hosts`: names in the Host header besides those of this machine's loopback. `models`: what clients call the
    model, the first one in replies; "*" among them is any name. None: the name of its folder."""

    host: str = "127.0.0.1"
    port: int = 8790
    hosts: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tools: str = "none"
    reasoning: str = "none"
    """How the model writes its calls of tools, and its thoughts (`thaw.gateway.reading`)."""
    parser_python: str = sys.executable
    """The Python that has the engine whose parsers these name."""
    spread: int = 8
    """By so many running requests an engine may be ahead of another one before requests go to that one and load the
    prefix there."""
    limits: Limits = Limits()
    keeping: Keeping = Keeping()
    audit: str | None = None
    """A file that gets a line for each request."""
    certificate: str | None = None
    certificate_key: str | None = None
    restore: bool = False
