"""Four attempts from one long context, through `thaw serve` and from the stock server behind it.

    python benchmarks/gateway_attempts.py MODEL --python .venv-vllm/bin/python --out receipts/gateway-attempts.json

A context of `--tokens` tokens is read once, as a response of the gateway's. Each round asks four questions about it at
once, in every arm:

    thaw         `previous_response_id` names the context; the server's KV pool was cycled by other prompts
    stock        the server's own Chat Completions, with the whole conversation; the pool was cycled likewise
    thaw-warm    as thaw, right after the same four
    stock-warm   as stock, right after the same four: its prefix cache holds the context

All arms ask the one vLLM server, whose KV pool has `--blocks` blocks; stock requests do not pass the gateway. The clock
runs from sending the four to the first token of each. Needs the extras [vllm] and [server] here, and vLLM with thaw in
`--python`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import httpx
from gateway_process import Served, served

import thaw
from thaw import receipt as r
from thaw import serve
from thaw.bench import text
from thaw.bench.rounds import Rounds, arms_of
from thaw.bench.sample import Sample
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.told import tell
from thaw.core.ids import digest
from thaw.engines.base import Engine
from thaw.receipt.machine import software, this_machine

QUESTIONS = ("Who is it about?", "When does it happen?", "What is the oldest thing?", "What is left out?")
MAX_TOKENS = 8
ARMS = {
    "thaw": ("through the gateway, pool cycled", "previous_response_id; the context is loaded once and forked"),
    "stock": ("stock vLLM, pool cycled", "the server's own API: the first attempt's prefix is read again"),
    "thaw-warm": ("through the gateway, at once again", "previous_response_id, right after the same four"),
    "stock-warm": ("stock vLLM, context in its cache", "the server's own API, right after the same four"),
}


class Answer(NamedTuple):
    """One attempt: seconds until its first token and its end, its text, and the engine's count of its prompt."""

    first_s: float
    total_s: float
    text: str
    num_prompt: int
    num_cached: int


class Attempts:
    """A context that was read through the gateway, and the arms."""

    def __init__(self, gateway: Served, url: str, engine: Engine, options: argparse.Namespace) -> None:
        self.stock_url, self.gateway_url, self.options = url, f"http://127.0.0.1:{gateway.port}", options
        self.num_fillers = 0
        ids = engine.codec.encode(text.document(options.tokens), first=True)[: options.tokens]
        self.document = f"{engine.codec.decode(ids)}\n\nSum this up."
        body = {"input": self.document, **sampling("max_output_tokens")}
        reply = httpx.post(f"{self.gateway_url}/v1/responses", json=body, headers=KEY, timeout=600).raise_for_status()
        told = reply.json()
        self.context, self.num_context = told["id"], int(told["usage"]["total_tokens"])
        self.answer = str(told["output"][0]["content"][0]["text"])

    def arms(self) -> dict[str, Callable[[], Sample]]:
        return {
            "thaw": lambda: self._after(self._cycle, self._by_thaw, self.num_context - 1),
            "stock": lambda: self._after(self._cycle, self._by_stock, 0),
            "thaw-warm": lambda: self._after(self._four_by_thaw, self._by_thaw, self.num_context - 1),
            "stock-warm": lambda: self._after(self._four_by_stock, self._by_stock, 0),
        }

    def _four_by_thaw(self) -> None:
        self._after(lambda: None, self._by_thaw, 0)

    def _four_by_stock(self) -> None:
        self._after(lambda: None, self._by_stock, 0)

    def _cycle(self) -> None:
        """Other prompts, none like another, until 1.5 times the pool has been used."""
        wanted, sent = 1.5 * self.options.blocks * self.options.block_size, 0
        while sent < wanted:
            self.num_fillers += 1
            prompt = f"{self.num_fillers}: {text.document(self.options.tokens // 12)}"
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
            reply = httpx.post(f"{self.stock_url}/v1/completions", json=body, timeout=600).raise_for_status().json()
            sent += reply["usage"]["prompt_tokens"]

    def _after(self, before: Callable[[], None], ask: Callable[[str, float], Answer], num_wanted: int) -> Sample:
        before()
        together = threading.Barrier(len(QUESTIONS))
        with ThreadPoolExecutor(len(QUESTIONS)) as threads:

            def one(question: str) -> Answer:
                together.wait()
                return ask(question, time.monotonic())

            answers = list(threads.map(one, QUESTIONS))
        prompt, cached = (sum(getattr(one, name) for one in answers) for name in ("num_prompt", "num_cached"))
        return Sample(
            values={
                "first_token_s": max(one.first_s for one in answers),
                "one_token_s": min(one.first_s for one in answers),
                "total_s": max(one.total_s for one in answers),
            },
            hits=r.Hits(
                num_prompt_tokens=prompt, num_wanted_tokens=num_wanted * len(answers), num_cached_tokens=cached,
                num_prefilled_tokens=prompt - cached,
            ),
            outputs={"text": digest(json.dumps([one.text for one in answers]).encode())},
        )  # fmt: skip

    def _by_thaw(self, question: str, began: float) -> Answer:
        body = {"input": question, "previous_response_id": self.context, **sampling("max_output_tokens")}
        said, first, usage = "", 0.0, None
        for event in events(f"{self.gateway_url}/v1/responses", body, KEY):
            if event["type"] == "response.output_text.delta":
                first = first or time.monotonic() - began
                said += event["delta"]
            elif event["type"] == "response.incomplete":
                usage = event["response"]["usage"]
        if usage is None or not first:
            raise SystemExit("a stream of the gateway's ended early")
        cached = usage["input_tokens_details"]["cached_tokens"]
        return Answer(first, time.monotonic() - began, said, usage["input_tokens"], cached)

    def _by_stock(self, question: str, began: float) -> Answer:
        messages = [
            {"role": "user", "content": self.document}, {"role": "assistant", "content": self.answer},
            {"role": "user", "content": question},
        ]  # fmt: skip
        body = {"messages": messages, "stream_options": {"include_usage": True}, **sampling("max_tokens")}
        said, first, usage = "", 0.0, None
        for event in events(f"{self.stock_url}/v1/chat/completions", body, {}):
            usage = event.get("usage") or usage
            delta = event["choices"][0]["delta"].get("content") if event["choices"] else ""
            if delta:
                first = first or time.monotonic() - began
                said += delta
        if usage is None or not first:
            raise SystemExit("a stream of the server's ended early")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(first, time.monotonic() - began, said, usage["prompt_tokens"], cached)


KEY = {"authorization": "Bearer t"}


def sampling(limit: str) -> dict[str, Any]:
    return {limit: MAX_TOKENS, "temperature": 0, "ignore_eos": True}


def events(url: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
    with httpx.stream("POST", url, json={**body, "stream": True}, headers=headers, timeout=600) as reply:
        if not reply.is_success:
            raise SystemExit(f"{url}: {reply.status_code} {reply.read()[:400]!r}")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def seal(engine: Engine, attempts: Attempts, rounds: Rounds, options: argparse.Namespace) -> r.Receipt:
    def first(arm: str, value: str = "first_token_s") -> r.Term:
        return r.Term(arm=arm, value=value)

    derived = [
        *(r.median(f"{arm}.first", f"{ARMS[arm][0]}: all four have a token", "s", first(arm)) for arm in ARMS),
        r.ratio("gain.all", "stock takes × the gateway, until all four have a token", first("stock"), first("thaw")),
        r.ratio(
            "gain.one", "stock takes × the gateway, until one has a token",
            first("stock", "one_token_s"), first("thaw", "one_token_s"),
        ),
        r.ratio("cost.warm", "the gateway takes × stock, context cached", first("thaw-warm"), first("stock-warm")),
    ]  # fmt: skip
    return r.make(
        kind="gateway.attempts",
        command=(
            f"python benchmarks/gateway_attempts.py MODEL --python VLLM_PYTHON --tokens {options.tokens} "
            f"--rounds {options.rounds} --blocks {options.blocks} --block-size {options.block_size}"
        ),
        versions=software("torch", "transformers", "starlette", "uvicorn") | {engine.info.name: engine.info.version},
        machine=this_machine(accelerator(engine.info)),
        model=model_of(engine),
        parameters={
            "tokens": options.tokens, "rounds": options.rounds, "blocks": options.blocks,
            "block_size": options.block_size, "attempts": len(QUESTIONS), "max_tokens": MAX_TOKENS,
            "context_tokens": attempts.num_context, **numerics(engine.info),
        },
        arms=arms_of(rounds.measured, list(ARMS).index, ARMS.__getitem__),
        derived=derived,
        checks=[
            r.all_hit("hit.thaw", "the gateway: nothing of the context prefilled again", "thaw"),
            r.all_hit("hit.warm", "the same, at once again", "thaw-warm"),
            r.equal_outputs("text", "the same greedy text as stock", "thaw", "stock", "text", promised=False),
        ],
        goals=[
            r.at_least("sooner", "first tokens at least 10 × sooner, pool cycled", "gain.all", 10),
            r.at_most("warm", "at most 1.05 × while the server's cache has the context", "cost.warm", 1.05),
        ],
        notes=(
            "All arms ask one vLLM server with thaw in it. Cycled: other prompts, 1.5 × its KV pool, were sent before.",
            "The gateway has its default settings; sessions of earlier rounds are open, and their blocks were reused.",
            "The stock arm's attempts share what the first of them reads, through vLLM's prefix cache.",
        ),
    )  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model")
    words.add_argument("--python", default=sys.executable, help="a Python with vLLM and thaw")
    words.add_argument("--out", type=Path)
    words.add_argument("--tokens", type=int, default=4000)
    words.add_argument("--rounds", type=int, default=6)
    words.add_argument("--blocks", type=int, default=64)
    words.add_argument("--block-size", type=int, default=128)
    options = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="thaw-attempts-") as folder, thaw.open(folder, create=True) as bare:
        arguments = (
            "--max-model-len", str(min(8192, (options.blocks - 4) * options.block_size)),
            "--num-gpu-blocks-override", str(options.blocks),
            "--block-size", str(options.block_size), "--enable-prompt-tokens-details",
            "--gpu-memory-utilization", "0.2",
        )  # fmt: skip
        started = serve.up(bare, "vllm", options.model, python=options.python, arguments=arguments)
        try:
            url = started.record.url
            with thaw.attach(url) as engine, served(Path(folder), ["--engine", url]) as gateway:
                began = time.monotonic()
                attempts = Attempts(gateway, url, engine, options)
                rounds = Rounds(lambda line: print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True), 0.5)
                rounds.alternate(options.rounds, attempts.arms())
                receipt = seal(engine, attempts, rounds, options)
        finally:
            serve.down(bare)
    tell(receipt, options.out)


if __name__ == "__main__":
    main()
