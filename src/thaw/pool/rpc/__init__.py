"""Calls to an engine in another process: `protocol` (messages), `connection` (frames), `client` and `server`."""
