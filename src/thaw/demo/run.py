"""The demo's story: a model reads a document once; a fresh process continues from it four times, and proves it.

    run(options, tell) ── reader process ──> thaw-demo/.thaw ──> hydrator process ──> checks, receipt

This process holds no model. It starts the two others one after the other, hands on their events, compares what they say
and writes the receipt. Every figure was measured in this run; nothing is kept between runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import msgspec

import thaw
from thaw.core import errors
from thaw.core.errors import Conflict, EngineDied, ThawError
from thaw.data.fresh_process import with_this_thaw
from thaw.demo import events, record
from thaw.demo.events import (
    Answered,
    ChildAnswered,
    ChildrenHydrated,
    Committed,
    Described,
    DocumentRead,
    Event,
    ModelLoaded,
)
from thaw.demo.story import DemoOptions, Story, StoryCheck
from thaw.demo.worker import DemoJob
from thaw.engines.registry import kind_of

FOLDER = "thaw-demo"
REPOSITORY = ".thaw"
RECEIPT = "receipt.json"
CAUSE = re.compile(r"\w*Error: (.+)")
Tell = Callable[[Event], None]
E = TypeVar("E", bound=msgspec.Struct)


def run(options: DemoOptions, tell: Tell, progress: Callable[[str], None]) -> Story:
    """Tell the story. Raises what the workers raised; a law that did not hold is in `checks`, not raised.

    `progress` gets one line for each step before the story (fetching the model)."""
    folder = prepare(options)
    engine_options = _engine_options(options, progress)
    job = DemoJob(
        role="reader",
        repository=str(folder / REPOSITORY),
        engine=options.engine,
        engine_options=engine_options,
        max_tokens=options.max_tokens,
        parent_max_tokens=options.parent_max_tokens,
        seed=options.seed,
    )
    thaw.init(folder / REPOSITORY).close()
    first = _Heard(work(job, tell))
    commit = first.one(Committed).commit
    second = _Heard(work(msgspec.structs.replace(job, role="hydrator", commit=commit), tell))
    story = _story(folder, first, second)
    record.write(story, options, folder / RECEIPT)
    return story


def prepare(options: DemoOptions) -> Path:
    """The empty folder to work in. Raises `Conflict` rather than touch a folder that is not a demo's."""
    folder = options.out or Path(FOLDER)
    if options.out is None and not options.force:
        number = 1
        while folder.exists():
            number += 1
            folder = Path(f"{FOLDER}-{number}")
    if folder.exists() and any(folder.iterdir()):
        _remove(folder, options.force)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove(folder: Path, force: bool) -> None:
    found = {path.name for path in folder.iterdir()}
    if not force:
        raise Conflict(f"{folder} is not empty. Name another folder with --out, or replace an older demo with --force.")
    if not found <= {REPOSITORY, RECEIPT} or REPOSITORY not in found:
        raise Conflict(f"{folder} holds more than a demo; nothing in it was changed. Name another folder with --out.")
    shutil.rmtree(folder / REPOSITORY)
    (folder / RECEIPT).unlink(missing_ok=True)


def _engine_options(options: DemoOptions, progress: Callable[[str], None]) -> dict[str, object]:
    kind = kind_of(options.engine)
    if options.model is not None:
        return {"model": options.model, **kind.modest}
    if not kind.needs_model:
        return {}
    from thaw.demo.model import ensure_demo_model

    return {"model": str(ensure_demo_model(progress)), **kind.modest}


def work(job: DemoJob, tell: Tell) -> Iterator[Event]:
    """Run one worker to its end, handing on its events as they come. Raises the error that it met."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, "-m", "thaw.demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=_environment(job.engine),
        )
        try:
            yield from _listen(process, job, tell)
        except EngineDied as error:
            raise EngineDied(f"{error}{_cause(noise)}") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            noise.seek(0)
            last = noise.read()[-2000:].decode(errors="replace").strip().splitlines()[-3:]
            raise EngineDied(f"the {job.role} process ended with code {process.returncode}: {' / '.join(last)}")
    tell(events.Ended(role=job.role, pid=process.pid, seconds=time.perf_counter() - started))


def _cause(noise: IO[bytes]) -> str:
    """What the engine's own processes said first went wrong; they say it on stderr only."""
    noise.seek(0)
    found = CAUSE.findall(noise.read().decode(errors="replace"))
    return f"\nIt said: {found[0][:1000]}" if found else ""


def _listen(process: subprocess.Popen[bytes], job: DemoJob, tell: Tell) -> Iterator[Event]:
    assert process.stdin is not None and process.stdout is not None
    _send(process.stdin, job)
    for line in process.stdout:
        event: Event = msgspec.json.decode(line, type=Event)
        if isinstance(event, events.WorkerFailed):
            process.wait()
            raise _error_of(event)
        tell(event)
        yield event
    process.wait()


def _send(pipe: IO[bytes], job: DemoJob) -> None:
    try:
        with pipe:
            pipe.write(msgspec.json.encode(job))
    except BrokenPipeError:
        return  # it died at once; its exit code and last lines say why


def _error_of(event: events.WorkerFailed) -> ThawError:
    """The worker's error as the same class here."""
    for found in vars(errors).values():
        if isinstance(found, type) and issubclass(found, ThawError) and found.kind == event.kind:
            return found(event.message)
    return ThawError(event.message)


def _environment(engine: str) -> dict[str, str]:
    """Ours, with the folder of this very thaw first, so that a worker imports the same one, and what keeps the engine
    quiet and content with a part of the memory. What the user set stays."""
    kind = kind_of(engine)
    return with_this_thaw({**kind.modest_environment, **kind.quiet, **os.environ})


class _Heard:
    """The events of one worker, looked up by kind."""

    def __init__(self, stream: Iterator[Event]) -> None:
        self._events = list(stream)

    def one(self, kind: type[E]) -> E:
        """The last event of this kind. Raises `EngineDied` when there was none."""
        found = [event for event in self._events if isinstance(event, kind)]
        if not found:
            raise EngineDied(f"the worker ended without saying {kind.__name__}; run the demo again")
        return found[-1]

    def children(self) -> tuple[ChildAnswered, ...]:
        return tuple(event for event in self._events if isinstance(event, ChildAnswered))


def _story(folder: Path, first: _Heard, second: _Heard) -> Story:
    committed, hydrated, children = first.one(Committed), second.one(ChildrenHydrated), second.children()
    parent, resumed = first.one(Answered), second.one(Answered)
    return Story(
        folder=str(folder),
        receipt=str(folder / RECEIPT),
        loaded=first.one(ModelLoaded),
        described=first.one(Described),
        read=first.one(DocumentRead),
        committed=committed,
        parent=parent,
        hydrated=hydrated,
        children=children,
        resumed=resumed,
        checks=tuple(checks(committed, hydrated, children, parent, resumed)),
    )


def checks(
    committed: Committed,
    hydrated: ChildrenHydrated,
    children: tuple[ChildAnswered, ...],
    parent: Answered,
    resumed: Answered,
) -> Iterator[StoryCheck]:
    """What was promised, against what the two processes said. An engine that samples at the end of every prompt (vLLM)
    has no KV of the last token yet: that one token is computed with what follows it."""
    proof, cached = hydrated.proof, [child.num_cached_tokens for child in children]
    yield StoryCheck(
        name="every stored byte was hashed while it was read",
        held=proof.verification in ("disk-verified", "arena-sealed", "device-verified") and proof.nbytes > 0,
        seen=f"{proof.verification}, {proof.nbytes:,} bytes",
    )
    last = committed.num_tokens - hydrated.num_kv
    yield StoryCheck(
        name="the engine found the whole document in its cache, for each child",
        held=bool(children) and proof.hit and last in (0, 1) and all(n == hydrated.num_kv for n in cached),
        seen=f"{', '.join(f'{n:,}' for n in cached)} of {committed.num_tokens:,} tokens",
    )
    yield StoryCheck(
        name=f"nothing was prefilled but each child's own question{' and the token before it' if last else ''}",
        held=bool(children) and all(c.num_prefilled_tokens == c.num_suffix_tokens + last for c in children),
        seen=f"{', '.join(str(c.num_prefilled_tokens) for c in children)} tokens",
    )
    yield StoryCheck(
        name="the children diverge",
        held=len({child.token_ids for child in children}) > 1,
        seen=f"{len({child.token_ids for child in children})} different answers",
    )
    yield from _same(parent, resumed)


def _same(parent: Answered, resumed: Answered) -> Iterator[StoryCheck]:
    n = len(parent.token_ids)
    tokens = sum(a == b for a, b in zip(parent.token_ids, resumed.token_ids, strict=False))
    logprobs = sum(a == b for a, b in zip(parent.logprobs, resumed.logprobs, strict=False))
    yield StoryCheck(
        name="resumed here, the parent says what it said there: tokens",
        held=parent.token_ids == resumed.token_ids and n > 0,
        seen=f"{tokens} of {n} equal",
    )
    yield StoryCheck(
        name="and their log probabilities, bit for bit",
        held=parent.logprobs == resumed.logprobs and n > 0,
        seen=f"{logprobs} of {n} equal",
    )
