"""Streams whose text holds characters that end a line elsewhere, and not in a stream of events. A model says them at
any time."""

from __future__ import annotations

import json

import httpx
import pytest

from gateway_stand import TOKEN, Start
from thaw.gateway import reply

SEPARATORS = "\x85\u2028\u2029"
TEXT = f"a{SEPARATORS}b"


@pytest.mark.parametrize("escaped", [True, False])
def test_clients_that_end_lines_elsewhere_read_each_event(
    start: Start, monkeypatch: pytest.MonkeyPatch, escaped: bool
) -> None:
    """As httpx does; the control says them as they are."""
    if not escaped:
        monkeypatch.setattr(reply, "LINE_ENDS", {})
    gateway = start()
    body = {"model": "fake", "prompt": TEXT, "max_tokens": 2, "stream": True, "echo": True}
    with httpx.stream(
        "POST", f"{gateway.url}/v1/completions", json=body, headers={"authorization": f"Bearer {TOKEN}"}
    ) as told:
        lines = [line[6:] for line in told.iter_lines() if line.startswith("data: {")]
    if not escaped:
        with pytest.raises(json.JSONDecodeError):
            [json.loads(line) for line in lines]
        return
    text = "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])
    assert text.startswith(TEXT)
