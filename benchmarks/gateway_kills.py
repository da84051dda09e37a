"""`kill -9` of a gateway, of the vLLM server behind it, and of both, while they answer: is anything lost?

    python benchmarks/gateway_kills.py MODEL --python .venv-vllm/bin/python --kills 100

Each round acknowledges a response, begins a long stream that continues it, and kills in the middle of that stream; of
`--engine-every` kills one takes the engine, the next one both, the others the gateway. Then the engine is started
again, the gateway too, and everything that was acknowledged must be there:

    every response         has the text that its client was told
    one of them, by chance is continued, and of its tokens none is prefilled again, by the engine's count
    the stream             goes on to its end where the engine alone was killed, nothing doubled or missing, or ends
                           with an error where the new engine generates something else; where the gateway was killed,
                           it reads as incomplete and names the point where it began

Ends with status 1 at the first thing that is lost. Needs the extras [vllm] and [server] here, and vLLM with thaw in
`--python`.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import httpx
from gateway_process import Served, served

import thaw
from thaw import serve
from thaw.bench import text

LIMIT = 2048
TOLD = 5
"""Pieces of text after which the kill comes."""


class Lost(Exception):
    """Something that was acknowledged is not there."""


class Stand:
    """Engine and gateway, started again after each kill."""

    def __init__(self, folder: Path, repo: thaw.Repository, options: argparse.Namespace) -> None:
        self.folder, self.repo, self.options = folder, repo, options
        self.stack = ExitStack()
        self.engine_pid = 0
        self.start_engine()
        self.gateway = self.start_gateway()
        self.http = httpx.Client(headers={"authorization": "Bearer t"}, timeout=600, trust_env=False)

    def start_engine(self) -> None:
        words = ("--max-model-len", str(LIMIT), "--enable-prompt-tokens-details", "--gpu-memory-utilization", "0.2")
        started = serve.up(self.repo, "vllm", self.options.model, python=self.options.python, arguments=words)
        self.engine_pid = started.record.pid

    def start_gateway(self) -> Served:
        """With the engine that `thaw up` left in the repository."""
        return self.stack.enter_context(served(self.folder, []))

    def kill_engine(self) -> None:
        """All of its processes. It is a child of this one, and is there until it is waited for."""
        os.killpg(self.engine_pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.engine_pid, 0)

    def kill_gateway(self) -> None:
        os.kill(self.gateway.pid, signal.SIGKILL)

    def close(self) -> None:
        self.stack.close()
        serve.down(self.repo)

    # -- what a client does

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        reply = self.http.post(f"{self._url}/v1/responses", json=body)
        if reply.status_code != 200:
            raise Lost(f"a request was answered {reply.status_code}: {reply.text[:300]}")
        found: dict[str, Any] = reply.json()
        return found

    def get(self, id: str) -> dict[str, Any]:
        reply = self.http.get(f"{self._url}/v1/responses/{id}")
        if reply.status_code != 200:
            raise Lost(f"{id} is answered {reply.status_code}: {reply.text[:300]}")
        found: dict[str, Any] = reply.json()
        return found

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self.http.stream("POST", f"{self._url}/v1/responses", json={**body, "stream": True}) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"


def said(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


class Kills:
    """The rounds, and what was acknowledged until now: by id, what the client was told."""

    def __init__(self, stand: Stand, options: argparse.Namespace) -> None:
        self.stand, self.options, self.rng = stand, options, random.Random(options.seed)
        self.acknowledged: dict[str, dict[str, Any]] = {}
        self.outcomes: collections.Counter[str] = collections.Counter()
        self._ask(input=f"{text.document(40)}\n\nSum this up.")

    def _ask(self, **body: Any) -> dict[str, Any]:
        reply = self.stand.post({"max_output_tokens": 8, "ignore_eos": True, **body})
        self.acknowledged[reply["id"]] = reply
        return reply

    def round(self, number: int) -> None:
        place = number % self.options.engine_every
        whom = "engine" if place == 0 else "both" if place == 1 and self.options.engine_every > 1 else "gateway"
        roots = list(self.acknowledged)[:1] if self.rng.random() < 0.3 else list(self.acknowledged)[-4:]
        parent = self._ask(input=f"Question {number}?", previous_response_id=self.rng.choice(roots))
        began, told, last = self._killed_in_between(parent, whom)
        if whom == "engine":
            self._gone_on(told, last)
        else:
            self._cut(began, parent)
        self._all_there()
        one = self.rng.choice(list(self.acknowledged.values()))
        child = self._ask(input="And?", previous_response_id=one["id"])
        cached, wanted = child["thaw"]["cached_tokens"], one["usage"]["total_tokens"] - 1
        if child["thaw"]["parent"] != one["thaw"]["point"] or cached != wanted:
            raise Lost(f"{one['id']} was continued with {cached} of {wanted} tokens")

    def _killed_in_between(self, parent: dict[str, Any], whom: str) -> tuple[str, str, dict[str, Any]]:
        """The stream's id, its text, and its last event: all of it where the gateway lived."""
        body = {"input": "On.", "previous_response_id": parent["id"], "max_output_tokens": 60, "ignore_eos": True}
        stream = self.stand.events(body)
        began, told, pieces, event = "", "", 0, {}
        try:
            for event in stream:
                began = began or event["response"]["id"]
                if event["type"] == "response.output_text.delta":
                    told, pieces = told + event["delta"], pieces + 1
                    if pieces == TOLD:
                        self._kill(whom)
        except httpx.HTTPError:
            if whom == "engine":
                raise Lost("the gateway's stream broke though only the engine was killed") from None
        if pieces < TOLD:
            raise SystemExit(f"the stream had {pieces} pieces, too few to kill in between: {event}")
        if whom != "engine":
            self.stand.gateway = self.stand.start_gateway()
        return began, told, event

    def _kill(self, whom: str) -> None:
        if whom != "engine":
            self.stand.kill_gateway()
        if whom != "gateway":
            self.stand.kill_engine()
            self.stand.start_engine()

    def _gone_on(self, told: str, last: dict[str, Any]) -> None:
        if last["type"] == "response.failed":
            self.outcomes["engine: another text, refused"] += 1
            return
        response = last.get("response", {})
        if last["type"] != "response.incomplete" or said(response) != told or response["usage"]["output_tokens"] != 60:
            raise Lost(f"the stream ended with {last['type']}, and was not told as a whole")
        self.acknowledged[response["id"]] = response
        self.outcomes["engine: went on"] += 1

    def _cut(self, began: str, parent: dict[str, Any]) -> None:
        kept = self.stand.get(began)
        if kept["status"] == "incomplete" and kept["thaw"]["point"] == parent["thaw"]["point"]:
            self.outcomes["gateway: incomplete"] += 1
            return
        raise Lost(f"a cut stream reads as {kept['status']} at {kept.get('thaw')}")

    def _all_there(self) -> None:
        for id, reply in self.acknowledged.items():
            if said(self.stand.get(id)) != said(reply):
                raise Lost(f"{id} has another text than its client was told")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model")
    words.add_argument("--python", default=sys.executable, help="a Python with vLLM and thaw")
    words.add_argument("--kills", type=int, default=100)
    words.add_argument("--engine-every", type=int, default=5, help="1: every kill takes the engine")
    words.add_argument("--seed", type=int, default=0)
    options = words.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="thaw-kills-") as folder, thaw.open(folder, create=True) as repo:
        stand = Stand(Path(folder), repo, options)
        try:
            kills = Kills(stand, options)
            for number in range(options.kills):
                kills.round(number)
                told = ", ".join(f"{name} {num}" for name, num in sorted(kills.outcomes.items()))
                print(f"{time.monotonic() - began:7.1f} s  {number + 1} kills: {told}", flush=True)
        except Lost as lost:
            raise SystemExit(f"lost: {lost}") from None
        finally:
            stand.close()
    print(f"{options.kills} kills, {len(kills.acknowledged)} acknowledged responses: nothing lost")


if __name__ == "__main__":
    main()
