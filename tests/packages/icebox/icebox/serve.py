"""The server: python -m icebox.serve MODEL PORT CONFIG. It touches no folders but the stores of its config."""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from icebox import make
from icebox.wire import VERBS, decode, encode
from thaw.core.errors import NotFound, ThawError
from thaw.data.tiers.folder import folder_mount
from thaw.engines.base import CapturePlan, Handle, HydratePlan


def main(model: str, port: str, config: str) -> None:
    stores = json.loads(Path(config).read_text())["stores"]
    engine, opened = make(model), set[str]()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/health": {}, "/icebox": {"sessions": len(opened)}}.get(self.path)
            self._say(404 if known is None else 200, known)

        def do_POST(self) -> None:
            try:
                given = self.rfile.read(int(self.headers["Content-Length"]))
                self._say(200, self._run(self.path[1:], given))
            except ThawError as error:
                self._say(400, {"kind": error.kind, "message": str(error)})

        def _run(self, verb: str, given: bytes) -> Any:
            raw = decode(given, dict[str, msgspec.Raw])
            arguments = {name: mounted(decode(raw[name], kind)) for name, kind in VERBS[verb][0].items()}
            found = getattr(engine, verb)
            if callable(found):
                positional = [arguments.pop(name) for name in ("session", "n", "token_ids", "requests", "plan")
                              if name in arguments]  # fmt: skip
                found = found(*positional, **arguments)
            found = found.result() if isinstance(found, Handle) else found
            if verb == "open":
                opened.add(found)
            return found

        def _say(self, status: int, value: Any) -> None:
            body = encode(value)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, text: str, *values: object) -> None:
            print("[icebox]", text % values, flush=True)

    def mounted(value: Any) -> Any:
        """A plan's store by its name alone: no path comes from a request."""
        if not isinstance(value, (CapturePlan, HydratePlan)):
            return value
        uuid = value.mount.uuid
        if uuid not in stores:
            raise NotFound(f"this icebox knows no store {uuid}")
        return msgspec.structs.replace(value, mount=folder_mount(uuid, Path(stores[uuid])))

    print("[icebox] freezing", model, flush=True)
    ThreadingHTTPServer((os.environ.get("ICEBOX_HOST", "127.0.0.1"), int(port)), Answers).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
