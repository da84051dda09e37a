"""What thaw gives an SGLang on a GPU, and what it costs: `python bench_sglang.py MODEL OUT PARTS`, with SGLang and thaw
importable.

PARTS are some of pressure, hydrate, fork and gap, joined by commas: the arms of `thaw bench vllm`, with plain requests
to the same SGLang server (its own prefix cache) on the other side, and HiCache as the third arm of pressure. Both sides
send requests over HTTP to the same server. The receipt in OUT is rewritten whenever an engine has done its part, so
a run that was cut off keeps what it measured. `--attention` names SGLang's attention backend; `--hicache-alone` takes
that arm of pressure and no other; with `--small` and a small model the same runs wherever SGLang does, without HiCache.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
from arguments import parser, with_readers

from thaw import receipt as r
from thaw.bench import text
from thaw.bench.rounds import Rounds
from thaw.bench.sample import Ask, Clock, Sample, children
from thaw.bench.subject import model_of, numerics
from thaw.bench.vllm import gap, hydrate, pressure, report
from thaw.bench.vllm.arms import Document, fresh_salt, plain_children, read_trunk
from thaw.bench.vllm.options import SUFFIX_TOKENS, Options
from thaw.bench.vllm.plain import PlainBatch, PlainRequest, PlainResult
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.engines.sglang.client import wire
from thaw.engines.sglang.settings import command_line
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository, Session
from thaw.repo import open as open_repository

GIB = 1 << 30
ENGINE: dict[str, object] = {
    "sampling_backend": "pytorch", "grammar_backend": "none", "mem_fraction_static": 0.7, "arena_nbytes": 40 * GIB,
    "cuda_graph_max_bs_decode": 64,
}  # fmt: skip
SIZES: dict[str, object] = {
    "trees": 12, "tree_tokens": 16004, "branches": 8, "branch_tokens": 64, "offload_gib": 30, "lengths": (4000, 16000),
    "hydrate_rounds": 6, "fork_tokens": 4096, "children": (4, 16), "child_tokens": 64, "rounds": 8, "settle_s": 0.2,
    "gap_tokens": 16000, "gap_others": 32, "gap_prompt": 64, "gap_steps": 128, "gap_most": 2048, "gap_rounds": 5,
}  # fmt: skip
SMALL: dict[str, object] = {
    "trees": 4, "tree_tokens": 300, "branches": 2, "branch_tokens": 4, "lengths": (300,), "hydrate_rounds": 2,
    "fork_tokens": 256, "children": (2,), "child_tokens": 4, "rounds": 2, "settle_s": 0.0, "returns": 1,
    "gap_tokens": 300, "gap_others": 3, "gap_prompt": 16, "gap_steps": 8, "gap_most": 256, "gap_rounds": 1,
}  # fmt: skip
BOOT_LIMIT_S = 300.0


class Plain:
    """Plain requests to one SGLang server, in streams, all of a batch sent at once."""

    def __init__(self, url: str, key: str) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="plain-sglang", daemon=True).start()
        self._url, self._headers = url, {"Authorization": f"Bearer {key}"}
        self._client = asyncio.run_coroutine_threadsafe(self._make(), self._loop).result()

    async def _make(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        more: dict[str, Any] = {"timeout": None, "limits": limits, "trust_env": False}
        return httpx.AsyncClient(base_url=self._url, headers=self._headers, **more)

    def run(self, requests: Sequence[PlainRequest]) -> PlainBatch:
        started = time.monotonic()
        results = tuple(asyncio.run_coroutine_threadsafe(self._all(requests), self._loop).result(600))
        total = time.monotonic() - started
        return PlainBatch(results=results, first_token_s=max(x.first_s for x in results) - started, total_s=total)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _all(self, requests: Sequence[PlainRequest]) -> list[PlainResult]:
        return list(await asyncio.gather(*(self._one(request) for request in requests)))

    async def _one(self, request: PlainRequest, arrivals: list[float] | None = None) -> PlainResult:
        body: dict[str, Any] = {
            "input_ids": request.tokens, "stream": True, "return_logprob": "logprobs" in request.fields,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": request.max_tokens, "ignore_eos": True},
        }  # fmt: skip
        if request.salt:
            body["extra_key"] = request.salt
        ids: list[int] = []
        first, cached = 0.0, 0
        async with self._client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {(await response.aread())[:500]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                    continue
                news = msgspec.json.decode(line[5:].strip().encode(), type=wire.StreamEvent)
                if news.error is not None or news.meta_info is None:
                    raise RuntimeError(str(news.error))
                chunk = wire.chunk(news, news.meta_info, len(ids))
                if chunk.token_ids and not ids:
                    first = time.monotonic()
                if chunk.token_ids and arrivals is not None:
                    arrivals.append(time.monotonic())
                ids += chunk.token_ids
                cached = chunk.more.get("num_cached_tokens", cached)
        return PlainResult(token_ids=tuple(ids), num_cached_tokens=cached, first_s=first)


class Run:
    def __init__(self, options: Options, target: Path, command: str) -> None:
        self.options, self.target, self.command = options, target, command
        self.started = time.monotonic()
        self.rounds = Rounds(self.say, options.settle_s)
        self.told: dict[str, r.format.Scalar] = {}
        self.model: r.Model | None = None
        self.card: str | None = None
        self._document: Document | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="thaw-bench-", dir=options.folder)) / "repo"

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.started:7.1f} s  {line}", flush=True)

    def hicache_alone(self) -> None:
        """The third arm of pressure, in a run of its own."""
        from transformers import AutoTokenizer

        from thaw.engines.hf.codec import HFCodec

        self.tokenised(HFCodec(AutoTokenizer.from_pretrained(str(self.options.engine_options["model"]))))
        self.offload()

    def offload(self) -> None:
        with self.hicache() as plain:
            assert self._document is not None
            pressure.measure_offload(self.rounds, self.options, plain, self._document)  # type: ignore[arg-type]
        self.keep()

    def all(self) -> None:
        options, parts = self.options, self.options.parts
        stored: list[hydrate.Stored] = []
        if {"pressure", "hydrate"} & set(parts):
            few = {"max_total_tokens": self.few_tokens} if "pressure" in parts else {}
            with self.engine("an engine with few tokens", **few) as (engine, repo, plain):
                document = self.document(engine)
                if "pressure" in parts:
                    pressure.measure(self.rounds, options, repo, plain, document)  # type: ignore[arg-type]
                if "hydrate" in parts:
                    stored = hydrate.store(self.rounds, options, repo, document)
            self.keep()
        if {"hydrate", "fork", "gap"} & set(parts):
            with self.engine("an engine with room") as (engine, repo, plain):
                if stored:
                    hydrate.measure(self.rounds, options, repo, plain, self.document(engine), stored)  # type: ignore[arg-type]
                    self.keep()
                if "fork" in parts:
                    self.fork(repo, plain, self.document(engine))
                    self.keep()
                if "gap" in parts:
                    gap.measure(self.rounds, options, repo, plain, self.document(engine))  # type: ignore[arg-type]
            self.keep()
        if "pressure" in parts and options.offload_gib:
            self.offload()

    @property
    def few_tokens(self) -> int:
        """Room for a third of the sessions."""
        options = self.options
        share = options.trees * options.tree_tokens // options.pressure
        one = options.tree_tokens + options.branches * (SUFFIX_TOKENS + options.branch_tokens)
        return max(share, one + 64, max(options.lengths) + 64 if "hydrate" in options.parts else 0)

    def fork(self, repo: Repository, plain: Plain, document: Document) -> None:
        options, salt = self.options, fresh_salt()
        trunk = document.session(options.fork_tokens)
        read_trunk(plain, trunk, salt)  # type: ignore[arg-type]
        with repo.session(seed=options.seed) as live:
            live.append(token_ids=trunk)
            for n in options.children:
                ask = Ask(n=n, suffixes=document.suffixes(n), max_tokens=options.child_tokens, temperature=0.0)
                native = partial(plain_children, plain, trunk, salt, num_wanted=live.num_kv)  # type: ignore[arg-type]
                arms = {
                    f"fork.{n}.greedy": partial(_fork, live, ask),
                    f"native.{n}.greedy": partial(native, ask),
                    f"native-logprobs.{n}.greedy": partial(native, ask, fields=[{"logprobs": 0}] * n),
                }
                self.rounds.alternate(options.rounds, arms)

    def document(self, engine: Engine) -> Document:
        return self.tokenised(engine.codec)

    def tokenised(self, codec: Any) -> Document:
        if self._document is None:
            o = self.options
            most = max(*o.children, o.branches)
            captured = o.gap_tokens * (o.gap_rounds + 2) if "gap" in o.parts else 0
            longest = max(*o.lengths, o.fork_tokens, o.trees * o.tree_tokens, captured, o.gap_prompt * o.gap_others)
            need = longest + SUFFIX_TOKENS * most
            self._document = Document(codec.encode(text.document(need // 8 + 1), first=True))
        return self._document

    @contextmanager
    def engine(self, what: str, **others: object) -> Iterator[tuple[Engine, Repository, Plain]]:
        self.say(f"booting {what}")
        with (
            load_engine("sglang", **{**self.options.engine_options, **others}) as engine,
            open_repository(self.folder, engine=engine, create=True) as repo,
        ):
            self.say("booted")
            if self.model is None:
                info = engine.info
                self.model = model_of(engine)
                named = {"engine": f"{info.name} {info.version}", "continuation": info.continuation}
                self.told = {**named, **numerics(info)}
            transport = engine._transport  # type: ignore[attr-defined]
            plain = Plain(transport.url, transport._server.key)
            try:
                yield engine, repo, plain
            finally:
                plain.close()
        gc.collect()

    @contextmanager
    def hicache(self) -> Iterator[Plain]:
        """A stock server with SGLang's own tier in host memory, and as few tokens."""
        from thaw.engines.sglang.client.boot import _free_port, _listens

        ours = ("model", "arena_nbytes", "spill", "policy", "readers")
        key, port = secrets.token_hex(16), _free_port()
        arguments = {
            "model_path": self.options.engine_options["model"], "host": "127.0.0.1", "port": port, "api_key": key,
            "skip_server_warmup": True, "incremental_streaming_output": True, "log_level": "warning",
            **{name: value for name, value in self.options.engine_options.items() if name not in ours},
            "max_total_tokens": self.few_tokens, "enable_hierarchical_cache": True,
            "hicache_size": self.options.offload_gib,
        }  # fmt: skip
        self.say("booting an engine with HiCache")
        log = self.target.with_suffix(".hicache.log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "sglang.launch_server", *command_line(arguments)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            url, ends = f"http://127.0.0.1:{port}", time.monotonic() + BOOT_LIMIT_S
            while not _listens(url):
                if process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError(f"HiCache did not start: {log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.2)
            self.say("booted")
            plain = Plain(url, key)
            yield plain
            plain.close()
        finally:
            for signal_number in (15, 9):
                try:
                    os.killpg(process.pid, signal_number)
                    process.wait(5)
                    time.sleep(1)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass

    def keep(self) -> None:
        """Write what there is."""
        if self.rounds.measured:
            self.target.write_bytes(r.dumps(self.seal()))

    def seal(self) -> r.Receipt:
        measured, options = self.rounds.measured, self.options
        numbers = report.derived(measured)
        with_hicache = "pressure.offload" in measured
        made = r.make(
            kind="bench.sglang", command=self.command,
            versions=software("sglang", "sglang-kernel", "torch", "triton", "transformers", "msgspec", "blake3"),
            machine=this_machine(_accelerator()), model=self.model,
            parameters={
                "parts": ",".join(options.parts), "lengths": ",".join(map(str, options.lengths)),
                "children": ",".join(map(str, options.children)), "few_tokens": self.few_tokens,
                **{n: getattr(options, n) for n in (
                    "hydrate_rounds", "fork_tokens", "child_tokens", "rounds", "trees", "tree_tokens", "branches",
                    "branch_tokens", "returns", "pressure", "gap_tokens", "gap_others", "gap_prompt", "gap_steps",
                    "gap_most", "gap_rounds", "seed", "settle_s",
                )},
                "offload_gib": options.offload_gib if with_hicache else 0,
                **{f"sglang.{n}": v for n, v in options.engine_options.items() if n != "model"}, **self.told,
            },
            arms=[_said(arm) for arm in report.arms(measured)], derived=[_said(number) for number in numbers],
            checks=[_said(check) for check in report.checks(measured)],
            goals=[_said(goal) for goal in report.goals(numbers)] if options.goals else (),
            notes=(*NOTES, HICACHE) if with_hicache else NOTES,
        )  # fmt: skip
        assert r.verify(r.dumps(made)).problems == ()
        return made


NOTES = (
    "Arms that are compared take turns in one run, in an order that is shuffled and then reversed, each ran once before"
    " without a record; ratios are of arms in one round. The arms of pressure run one after the other instead, each"
    " with the pool to itself; pairs are visits of the same session in the same order.",
    "Plain requests carry an extra_key as a session does, so neither arm finds KV of the other. num_cached_tokens is"
    " SGLang's own count.",
    "All arms send their requests over HTTP from one process, each as a stream of increments.",
    "The engine that hydrates was booted after the one that wrote the commits had ended; packs are in memory.",
)
HICACHE = (
    "The arm of HiCache is a stock server with --enable-hierarchical-cache and as few tokens on the GPU as the others."
)


def _fork(live: Session, ask: Ask) -> Sample:
    return children(live, ask, Clock(), num_wanted=live.num_kv)


def _said(of: Any) -> Any:
    """A receipt's words about the engine that was measured; the words are those of `thaw bench vllm`."""
    swap = (("vLLM's own offload tier", "HiCache"), ("vLLM's offload tier", "HiCache"), ("vLLM", "SGLang"))
    changed = {}
    for name in ("title", "text"):
        words = getattr(of, name, None)
        for old, new in swap if words is not None else ():
            words = words.replace(old, new)
        if words is not None:
            changed[name] = words
    return msgspec.structs.replace(of, **changed)


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def main() -> None:
    words = with_readers(parser(__doc__))
    words.add_argument("--attention", default="triton")
    words.add_argument("--page", type=int, default=1)
    words.add_argument("--returns", type=int, default=2, help="to each session under pressure")
    words.add_argument("--hicache-gib", type=int, default=SIZES["offload_gib"])
    words.add_argument("--hicache-alone", action="store_true")
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    parts = tuple(told.parts.split(","))
    usual: dict[str, object] = {"model": told.model, "page_size": told.page}
    if told.readers:
        usual["readers"] = told.readers
    on_gpu = {**ENGINE, **usual, "attention_backend": told.attention}
    engine = {**usual, "max_total_tokens": 4096} if told.small else on_gpu
    sizes = SMALL if told.small else {**SIZES, "returns": told.returns, "offload_gib": told.hicache_gib}
    asked = {"parts": parts, "folder": told.out, "block_size": 16, "engine_options": engine, "goals": not told.small}
    options = msgspec.convert({**sizes, **asked}, Options)
    flags = {"--page": (told.page, 1), "--returns": (told.returns, 2), "--readers": (told.readers, 0)}
    more = "".join(f" {flag} {given}" for flag, (given, usual_one) in flags.items() if given != usual_one)
    more += " --hicache-alone" if told.hicache_alone else ""
    command = f"python benchmarks/gpu/bench_sglang.py MODEL OUT {told.parts} --attention {told.attention}{more}"
    run = Run(options, told.out / f"bench-sglang-{'-'.join(parts)}.json", command)
    try:
        run.hicache_alone() if told.hicache_alone else run.all()
    finally:
        run.keep()
        shutil.rmtree(run.folder.parent)
    made = run.seal()
    for line in (*made.derived, *made.checks, *made.goals):
        print(json.dumps(msgspec.to_builtins(line)), flush=True)


if __name__ == "__main__":
    main()
