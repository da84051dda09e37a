"""Starting, finding and ending a repository's engine server: what `thaw up` and `thaw down` do, for any program.

repo = thaw.open("runs")
started = serve.up(repo, "vllm", "path/to/model")
engine = thaw.attach(started.record.url)
"""

from __future__ import annotations

from thaw.serve.command import NoServer, has_server, require_keys
from thaw.serve.lifecycle import Started, down, running, up
from thaw.serve.record import Served

__all__ = ["NoServer", "Served", "Started", "down", "has_server", "require_keys", "running", "up"]
