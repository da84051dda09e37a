"""A LangGraph fan-out from a conversation whose KV has left the engine: thaw against the same vLLM server's own API.

    python benchmarks/langgraph_fanout.py MODEL --python .venv-vllm/bin/python --out receipts/bench-langgraph.json

A graph reads a document of `--tokens` tokens, and four reviewers continue from there side by side. Each round runs the
fan-out from that checkpoint again, by time travel, in every arm:

    thaw         ChatThaw over the server; the pool was cycled by other prompts, and no session is open
    stock        the server's own Chat Completions with its prefix cache; the pool was cycled likewise
    stock-warm   as stock, right after the same fan-out: where the server's cache still has the prefix, thaw is no gain

All arms ask the one server, whose KV pool has `--blocks` blocks. The clock runs from the graph's start to the first
token of all four (and of one); fillers are sent before it. Needs the extras [vllm] and [langgraph] here, and vLLM with
thaw in `--python`.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Send

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
from thaw.integrations.langgraph import ChatThaw, ThawSaver, point_of
from thaw.receipt.machine import software, this_machine

QUESTIONS = ("Who is it about?", "When does it happen?", "What is the oldest thing?", "What is left out?")
MAX_TOKENS = 8
THREAD = {"configurable": {"thread_id": "fan-out"}}
ARMS = {
    "thaw": ("thaw, pool cycled", "ChatThaw: the checkpoint's point is loaded once and forked"),
    "stock": ("stock vLLM, pool cycled", "the server's own API: the first branch's prefix is read again"),
    "stock-warm": ("stock vLLM, prefix in its cache", "the server's own API, right after the same fan-out"),
}


class ServersOwn(BaseChatModel):
    """The server's Chat Completions as any client asks it, streaming."""

    url: str

    @property
    def _llm_type(self) -> str:
        return "openai-compatible"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        raise NotImplementedError("this bench streams")

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        body = {
            "messages": convert_to_openai_messages(messages), "max_tokens": MAX_TOKENS, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=600) as reply:
            if not reply.is_success:
                raise SystemExit(f"the server answered {reply.status_code}: {reply.read()[:400]!r}")
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    yield ChatGenerationChunk(message=_chunk(event))


def _chunk(event: dict[str, Any]) -> AIMessageChunk:
    usage = event.get("usage")
    told = {} if usage is None else {
        "usage_metadata": {
            "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
            "input_token_details": {"cache_read": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0},
        }
    }  # fmt: skip
    said = event["choices"][0]["delta"].get("content") if event["choices"] else ""
    return AIMessageChunk(content=said or "", **told)


class Fan(MessagesState):
    answers: Annotated[list[AIMessage], operator.add]


def graph_of(model: BaseChatModel, saver: ThawSaver) -> Any:
    graph = StateGraph(Fan)
    graph.add_node("read", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("wait", lambda state: {})
    graph.add_node("review", lambda state: {"answers": [model.invoke(state["messages"])]})
    graph.add_edge(START, "read")
    graph.add_edge("read", "wait")

    def fan_out(state: Fan) -> list[Send]:
        return [Send("review", {"messages": [*state["messages"], HumanMessage(q)]}) for q in QUESTIONS]

    graph.add_conditional_edges("wait", fan_out, ["review"])
    return graph.compile(checkpointer=saver, interrupt_before=["wait"])


class FanOut:
    """One server, one thread that was read, and the arms."""

    def __init__(self, repo: thaw.Repository, saver: ThawSaver, url: str, options: argparse.Namespace) -> None:
        self.repo, self.url, self.options = repo, url, options
        sampling = thaw.Sampling(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
        self.model = ChatThaw(repo=repo, sampling=sampling)
        self.thaw, self.stock = graph_of(self.model, saver), graph_of(ServersOwn(url=url), saver)
        self.num_fillers = 0
        self.thaw.invoke({"messages": [HumanMessage(self._document())]}, THREAD)
        self.at = self.thaw.get_state(THREAD).config
        read = self.thaw.get_state(THREAD).values["messages"][-1]
        self.num_prefix = len(repo.show(str(point_of(read))).tokens)

    def _document(self) -> str:
        codec = self.repo.engine.codec
        ids = codec.encode(text.document(self.options.tokens), first=True)[: self.options.tokens]
        return f"{codec.decode(ids)}\n\nSum this up."

    def arms(self) -> dict[str, Any]:
        return {"thaw": self._by_thaw, "stock": self._by_stock, "stock-warm": self._by_warm}

    def _by_thaw(self) -> Sample:
        self.model.close()
        self._cycle()
        return self._fan_out(self.thaw, self.num_prefix - 1)

    def _by_stock(self) -> Sample:
        self._cycle()
        return self._fan_out(self.stock, 0)

    def _by_warm(self) -> Sample:
        self._fan_out(self.stock, 0)
        return self._fan_out(self.stock, 0)

    def _cycle(self) -> None:
        """Other prompts, none like another, until 1.5 times the pool has been used."""
        wanted, sent = 1.5 * self.options.blocks * self.options.block_size, 0
        while sent < wanted:
            self.num_fillers += 1
            prompt = f"{self.num_fillers}: {text.document(self.options.tokens // 12)}"
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
            reply = httpx.post(f"{self.url}/v1/completions", json=body, timeout=600).raise_for_status().json()
            sent += reply["usage"]["prompt_tokens"]

    def _fan_out(self, graph: Any, num_wanted: int) -> Sample:
        firsts: dict[str, float] = {}
        began = time.monotonic()
        for mode, news in graph.stream(None, self.at, stream_mode=["messages", "values"]):
            if mode == "values":
                answers = news["answers"]
                continue
            chunk, about = news
            if about["langgraph_node"] == "review" and chunk.content:
                firsts.setdefault(about["langgraph_checkpoint_ns"], time.monotonic() - began)
        total = time.monotonic() - began
        if len(firsts) != len(QUESTIONS) or len(answers) != len(QUESTIONS):
            raise SystemExit(f"{len(firsts)} of {len(QUESTIONS)} branches streamed, {len(answers)} answered")
        return Sample(
            values={"first_token_s": max(firsts.values()), "one_token_s": min(firsts.values()), "total_s": total},
            hits=_hits(answers, num_wanted),
            outputs={"text": digest(json.dumps([str(one.content) for one in answers]).encode())},
        )


def _hits(answers: list[AIMessage], num_wanted: int) -> r.Hits:
    used: list[Any] = [one.usage_metadata for one in answers]
    prompt = sum(one["input_tokens"] for one in used)
    cached = sum(one["input_token_details"]["cache_read"] for one in used)
    return r.Hits(
        num_prompt_tokens=prompt, num_wanted_tokens=num_wanted * len(answers), num_cached_tokens=cached,
        num_prefilled_tokens=prompt - cached,
    )  # fmt: skip


def seal(engine: Engine, fan: FanOut, rounds: Rounds, options: argparse.Namespace) -> r.Receipt:
    def first(arm: str, value: str = "first_token_s") -> r.Term:
        return r.Term(arm=arm, value=value)

    derived = [
        *(r.median(f"{arm}.first", f"{ARMS[arm][0]}: all four have a token", "s", first(arm)) for arm in ARMS),
        r.ratio("gain.all", "stock takes × thaw, until all four have a token", first("stock"), first("thaw")),
        r.ratio(
            "gain.one", "stock takes × thaw, until one has a token",
            first("stock", "one_token_s"), first("thaw", "one_token_s"),
        ),
        r.ratio("gain.warm", "stock with the prefix in its cache takes × thaw", first("stock-warm"), first("thaw")),
    ]  # fmt: skip
    return r.make(
        kind="bench.langgraph",
        command=(
            f"python benchmarks/langgraph_fanout.py MODEL --python VLLM_PYTHON --tokens {options.tokens} "
            f"--rounds {options.rounds} --blocks {options.blocks} --block-size {options.block_size}"
        ),
        versions=software("torch", "transformers", "langgraph", "langgraph-checkpoint", "langchain-core")
        | {engine.info.name: engine.info.version},
        machine=this_machine(accelerator(engine.info)),
        model=model_of(engine),
        parameters={
            "tokens": options.tokens, "rounds": options.rounds, "blocks": options.blocks,
            "block_size": options.block_size, "branches": len(QUESTIONS), "max_tokens": MAX_TOKENS,
            "prefix_tokens": fan.num_prefix, **numerics(engine.info),
        },
        arms=arms_of(rounds.measured, list(ARMS).index, ARMS.__getitem__),
        derived=derived,
        checks=[
            r.all_hit("hit.thaw", "thaw: nothing of the prefix prefilled again", "thaw"),
            r.equal_outputs("text", "the same greedy text as stock", "thaw", "stock", "text", promised=False),
        ],
        goals=[r.at_least("sooner", "first tokens of the fan-out at least 10 × sooner", "gain.all", 10)],
        notes=(
            "All arms ask one vLLM server with thaw in it. Cycled: other prompts, 1.5 × its KV pool, were sent before.",
            "The stock arm's branches share what the first of them reads, through vLLM's prefix cache.",
        ),
    )  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model")
    words.add_argument("--python", default=sys.executable, help="a Python with vLLM and thaw")
    words.add_argument("--out", type=Path)
    words.add_argument("--tokens", type=int, default=6000)
    words.add_argument("--rounds", type=int, default=6)
    words.add_argument("--blocks", type=int, default=64)
    words.add_argument("--block-size", type=int, default=128)
    options = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="thaw-fanout-") as folder, thaw.open(folder, create=True) as bare:
        arguments = (
            "--max-model-len", str(min(8192, (options.blocks - 4) * options.block_size)),
            "--num-gpu-blocks-override", str(options.blocks),
            "--block-size", str(options.block_size), "--enable-prompt-tokens-details",
        )  # fmt: skip
        started = serve.up(bare, "vllm", options.model, python=options.python, arguments=arguments)
        try:
            url = started.record.url
            with (
                thaw.attach(url) as engine,
                thaw.open(folder, engine=engine) as repo,
                ThawSaver(repo) as saver,
            ):
                began = time.monotonic()
                fan = FanOut(repo, saver, url, options)
                rounds = Rounds(lambda line: print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True), 0.5)
                rounds.alternate(options.rounds, fan.arms())
                receipt = seal(engine, fan, rounds, options)
        finally:
            serve.down(bare)
    tell(receipt, options.out)


if __name__ == "__main__":
    main()
