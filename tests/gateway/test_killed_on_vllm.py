"""`kill -9` of the gateway, of the vLLM server behind it, and of both, while they answer: nothing acknowledged is lost.

Each round acknowledges a response, begins a long stream that continues it, and kills in the middle of that stream. Then
what was killed is started again, and:

    every response         has the text that its client was told
    one of them, by chance is continued, and of its tokens none is prefilled again, by the engine's count
    the stream             goes on to its end where the engine alone was killed, nothing doubled or missing, or ends
                           with an error where the new engine generates something else; where the gateway was killed,
                           it reads as incomplete and names the point where it began
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_process import Process, openai

import thaw
from thaw import serve

VLLM = Path(__file__).resolve().parents[2] / ".venv-vllm/bin/python"
NUM_KILLS, ENGINE_EVERY = 100, 5
"""Of five kills one takes the engine, one both, and three the gateway."""
LIMIT, LENGTH, LONGER = 2048, 60, 400
"""Tokens: of the engine, of a stream that goes on after the kill, and of one that nobody but the kill is to end."""
TOLD = 5
"""Pieces of text after which the kill comes."""
LONG = "The river Elbe runs from the mountains to the sea, past old towns and wide meadows. " * 20

BROKEN = (openai.APIError, httpx.HTTPError)
"""How a client learns that its gateway is gone."""

pytestmark = pytest.mark.soak("boots vLLM forty times", receipt="gateway-kills-vllm", covers=("src/thaw/gateway",))


class Both:
    """An engine and a gateway, started again after each kill."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._model = folder, model
        self.repo = thaw.open(folder, create=True)
        self.start_engine()
        self.gateway = Process(folder)

    def start_engine(self) -> None:
        words = ("--max-model-len", str(LIMIT), "--enable-prompt-tokens-details", "--enforce-eager")
        self.engine = serve.up(self.repo, "vllm", str(self._model), python=str(VLLM), arguments=words).record.pid

    def kill(self, whom: str) -> None:
        """All processes of it; the engine is there again when this returns."""
        if whom != "engine":
            self.gateway.end(signal.SIGKILL)
        if whom != "gateway":
            os.killpg(self.engine, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self.engine, 0)
            self.start_engine()

    def start_gateway(self) -> None:
        for stream in (self.gateway.begun.stdout, self.gateway.begun.stderr):
            assert stream is not None
            stream.close()
        self.gateway = Process(self._folder)

    def close(self) -> None:
        self.gateway.end()
        serve.down(self.repo)
        self.repo.close()


@pytest.fixture
def both(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    if not VLLM.exists():
        pytest.skip("make .venv-vllm installs the engine that is killed")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    made = Both(tmp_path / "runs", demo_model)
    yield made
    made.close()


class Rounds:
    """The rounds, and what was acknowledged until now."""

    def __init__(self, both: Both) -> None:
        self._both, self._rng = both, random.Random(0)
        self.acknowledged: list[Any] = []
        self.ended: list[Any] = []
        """Streams that went on. They ran past the end of their turn, so their tokens are not those of their text."""
        self.counts: Counter[str] = Counter()
        self._ask(input=f"{LONG}\n\nSum this up.")

    def _client(self) -> Any:
        return self._both.gateway.client

    def _ask(self, **more: Any) -> Any:
        reply = self._client().responses.create(model=self._both.gateway.model, **{"max_output_tokens": 8, **more})
        if not more.get("stream"):
            self.acknowledged.append(reply)
        return reply

    def round(self, number: int) -> None:
        whom = {0: "engine", 1: "both"}.get(number % ENGINE_EVERY, "gateway")
        near = self.acknowledged[:1] if self._rng.random() < 0.3 else self.acknowledged[-4:]
        parent = self._ask(input=f"Question {number}?", previous_response_id=self._rng.choice(near).id)
        began, told, last = self._killed_in_between(parent, whom)
        if whom == "engine":
            self._ended(told, last)
        else:
            kept = self._client().responses.retrieve(began)
            assert kept.status == "incomplete" and kept.thaw["point"] == parent.thaw["point"]
        self.counts[f"kills of {'the ' if whom != 'both' else ''}{whom}"] += 1
        for reply in (*self.acknowledged, *self.ended):
            assert self._client().responses.retrieve(reply.id).output_text == reply.output_text
        one = self._rng.choice(self.acknowledged)
        child = self._ask(input="And?", previous_response_id=one.id)
        assert child.thaw["parent"] == one.thaw["point"]
        assert child.thaw["cached_tokens"] == one.usage.total_tokens - 1

    def _killed_in_between(self, parent: Any, whom: str) -> tuple[str, str, Any]:
        """The stream's id, its text, and its last event: of all of it where the gateway lived."""
        stream = self._ask(
            input="On.", previous_response_id=parent.id, max_output_tokens=LENGTH if whom == "engine" else LONGER,
            stream=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        began, told, pieces, event = "", "", 0, None
        with suppress(*(() if whom == "engine" else BROKEN)):
            for event in stream:
                began = began or event.response.id
                if event.type == "response.output_text.delta":
                    told, pieces = told + event.delta, pieces + 1
                    if pieces == TOLD:
                        self._both.kill(whom)
        assert pieces >= TOLD, f"the stream ended before the kill: {event}"
        if whom != "engine":
            self._both.start_gateway()
        return began, told, event

    def _ended(self, told: str, last: Any) -> None:
        if last.type == "response.failed":
            self.counts["streams that the new engine would have continued otherwise, ended with an error"] += 1
            return
        assert last.type == "response.incomplete" and last.response.output_text == told
        assert last.response.usage.output_tokens == LENGTH
        self.ended.append(last.response)
        self.counts["streams that went on in a new engine"] += 1


@pytest.mark.timeout(3 * 3600)
def test_what_was_acknowledged_is_there_after_a_hundred_kills(both: Both, soak_receipt: Callable[..., None]) -> None:
    rounds, began = Rounds(both), time.monotonic()
    for number in range(NUM_KILLS):
        rounds.round(number)
        print(f"{time.monotonic() - began:7.1f} s  {number + 1}: {dict(rounds.counts)}", file=sys.stderr, flush=True)
    soak_receipt(
        what=f"a gateway, the vLLM behind it, or both, killed with kill -9 in the middle of a stream {NUM_KILLS} times",
        held="every acknowledged response had its text and went on with none of its tokens prefilled again; a stream "
        "whose engine died went on without a token doubled or lost, or ended with an error",
        counts={**dict(sorted(rounds.counts.items())), "acknowledged responses": len(rounds.acknowledged)},
    )
