"""The demo's two processes: `python -m thaw.demo.worker`, a job on stdin, events on stdout.

    reader     reads the document, commits, goes on as if nothing had happened, and ends
    hydrator   finds only what is on disk: hydrates it as four children, lets them answer, commits them, and answers
               once more as the parent did, so that the two can be compared

Nothing passes from the first to the second but the repository's folder and the commit's id.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Literal, TypeVar

import msgspec

from thaw.core import cache
from thaw.core.errors import ThawError, TooLong, Unsupported
from thaw.core.objects import encode
from thaw.core.sampling import Sampling
from thaw.demo import document, events, prompts
from thaw.demo.events import Event
from thaw.engines import load_engine
from thaw.engines.base import Codec, Completion, Engine, GenerateRequest, Message
from thaw.repo import Group, Repository, Session, Stream
from thaw.repo import open as open_repository

ROOM = 512
"""Tokens kept free for the framing, a question and its answer."""
TRUNK, ANSWERS = "main", "answer"
EVERY_S = 0.25
Tell = Callable[[Event], None]
T = TypeVar("T")


class DemoJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is to do. `commit` is the hydrator's starting point."""

    role: Literal["reader", "hydrator"]
    repository: str
    engine: str
    engine_options: dict[str, object]
    max_tokens: int
    parent_max_tokens: int
    seed: int
    commit: str = ""


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """The words as this model takes them: by its chat template where that is prefix-stable, else as plain text.

    `suffixes[i]` are the tokens of question i, to stand after `trunk`.
    """

    chat: bool
    text: str
    trunk: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]


def script(engine: Engine) -> Script:
    """Render trunk and questions once, the same in both processes."""
    codec, text = engine.codec, fitting(engine)
    try:
        found = _chat_script(codec, text)
    except Unsupported:
        found = None
    return found or _plain_script(codec, text)


def fitting(engine: Engine) -> str:
    """The document, cut at the end where the model's context is too short for it, the framing and the answers."""
    room = engine.info.max_model_len - ROOM
    if room < 1:
        raise TooLong(f"the model has {engine.info.max_model_len} positions; the demo needs more than {ROOM}")
    ids = engine.codec.encode(document(), first=True)
    return document() if len(ids) <= room else engine.codec.decode_settled(ids[:room])


def _chat_script(codec: Codec, text: str) -> Script | None:
    """None where the template does not begin a longer conversation as it began the shorter one."""
    before = _messages(text)
    trunk = codec.render_chat(before, add_generation_prompt=False)
    suffixes = []
    for question in prompts.QUESTIONS:
        whole = codec.render_chat([*before, _asked(question)], add_generation_prompt=True)
        if whole[: len(trunk)] != trunk:
            return None
        suffixes.append(tuple(whole[len(trunk) :]))
    return Script(chat=True, text=text, trunk=tuple(trunk), suffixes=tuple(suffixes))


def _messages(text: str) -> list[Message]:
    return [dict(message) for message in prompts.trunk(text)]


def _asked(question: str) -> Message:
    return dict(prompts.question(question))


def _plain_script(codec: Codec, text: str) -> Script:
    return Script(
        chat=False,
        text=text,
        trunk=tuple(codec.encode(prompts.plain_trunk(text), first=True)),
        suffixes=tuple(tuple(codec.encode(prompts.plain_question(q), first=False)) for q in prompts.QUESTIONS),
    )


def read(repo: Repository, job: DemoJob, tell: Tell) -> None:
    """The reader: prefill, commit, then the parent's own answer, uninterrupted."""
    words = script(repo.engine)
    session = repo.session(seed=job.seed)
    started = time.perf_counter()
    with _progress(session, len(words.trunk), tell):
        if words.chat:
            session.append(messages=_messages(words.text))
        else:
            session.append(token_ids=words.trunk)
    tell(events.DocumentRead(num_tokens=session.num_tokens, seconds=time.perf_counter() - started))
    _describe(repo.engine, tell)
    started = time.perf_counter()
    done = session.commit("read the handbook", branch=TRUNK)
    tell(
        events.Committed(
            commit=done.commit,
            branch=TRUNK,
            num_tokens=done.num_tokens,
            nbytes=done.nbytes_written,
            seconds=time.perf_counter() - started,
        )
    )
    _answer(session, words, job, tell)


def hydrate(repo: Repository, job: DemoJob, tell: Tell) -> None:
    """The hydrator: four children of the commit, then the parent again."""
    words = script(repo.engine)
    started = time.perf_counter()
    with repo.fork(job.commit, len(words.suffixes)) as group:
        took, proof = time.perf_counter() - started, group[0].proof
        assert proof is not None
        tell(events.ChildrenHydrated(num_children=len(group), num_kv=group[0].num_kv, seconds=took, proof=proof))
        completions = _children(group, words, job, tell)
        for i, (session, completion) in enumerate(zip(group, completions, strict=True)):
            tell(_commit_child(session, completion, words, i))
    with repo.session(job.commit) as parent:
        _answer(parent, words, job, tell)


def _children(group: Group, words: Script, job: DemoJob, tell: Tell) -> list[Completion]:
    sampling = Sampling(temperature=0.0, max_tokens=job.max_tokens)
    if not words.chat:
        return _told(group.stream("", sampling, token_ids=words.suffixes), tell)
    asked = [[_asked(question)] for question in prompts.QUESTIONS]
    return [result.completion for result in _told(group.chat_stream(asked, sampling), tell)]


def _told(stream: Stream[list[T]], tell: Tell) -> list[T]:
    for delta in stream:
        tell(events.ChildSaid(index=delta.index, text=delta.text))
    return stream.result()


def _commit_child(session: Session, completion: Completion, words: Script, index: int) -> events.ChildAnswered:
    question = prompts.QUESTIONS[index]
    done = session.commit(question, branch=f"{ANSWERS}/{index}")
    usage = completion.usage
    return events.ChildAnswered(
        index=index,
        question=question,
        text=completion.text,
        token_ids=completion.token_ids,
        num_suffix_tokens=len(words.suffixes[index]),
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_prefilled_tokens=usage.num_prefilled_tokens,
        ttft_s=completion.ttft_s,
        commit=done.commit,
        branch=f"{ANSWERS}/{index}",
    )


def _answer(session: Session, words: Script, job: DemoJob, tell: Tell) -> None:
    """The parent's own answer to the first question, drawn at temperature 1 from the session's seed."""
    sampling = Sampling(temperature=1.0, max_tokens=job.parent_max_tokens, ignore_eos=True)
    if words.chat:
        done = session.chat([_asked(prompts.QUESTIONS[0])], sampling).completion
    else:
        done = session.generate("", sampling, token_ids=words.suffixes[0])
    tell(
        events.Answered(
            token_ids=done.token_ids,
            logprobs=done.logprobs,
            text=done.text,
            ttft_s=done.ttft_s,
            total_s=done.total_s,
        )
    )


def _warm_up(engine: Engine) -> None:
    """What an engine does only once, at its first greedy and its first drawn token, belongs to loading it."""
    prompt = tuple(engine.codec.encode("Hello", first=True))
    sessions = [engine.open(seed=0), engine.open(seed=0)]
    drawn = Sampling(temperature=1.0, max_tokens=2, ignore_eos=True)
    greedy = Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.generate(
        [
            GenerateRequest(session=session, prompt=prompt, sampling=sampling)
            for session, sampling in zip(sessions, (drawn, greedy), strict=True)
        ]
    ).result()
    for session in sessions:
        engine.close_session(session)


def _describe(engine: Engine, tell: Tell) -> None:
    identity = engine.identity()
    tell(
        events.Described(
            architecture=identity.architecture,
            dtype=identity.dtype,
            identity=encode(identity)[0],
            kv_token_nbytes=cache.token_nbytes(identity.groups),
        )
    )


@contextmanager
def _progress(session: Session, total: int, tell: Tell) -> Iterator[None]:
    """How far the prefill is, four times a second."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY_S):
            tell(events.Reading(done=min(session.num_kv, total), total=total))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def main() -> int:
    """One job. Events go to the stdout that this process was started with; what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    tell = _teller(out)
    try:
        job = msgspec.json.decode(sys.stdin.buffer.read(), type=DemoJob)
        tell(events.WorkerStarted(role=job.role, pid=os.getpid()))
        started = time.perf_counter()
        with load_engine(job.engine, **job.engine_options) as engine:
            _warm_up(engine)
            info = engine.info
            took = time.perf_counter() - started
            tell(events.ModelLoaded(model=info.model, engine=info.name, device=info.device, seconds=took))
            with open_repository(job.repository, engine=engine, create=False) as repo:
                (read if job.role == "reader" else hydrate)(repo, job, tell)
    except ThawError as error:
        tell(events.WorkerFailed(kind=error.kind, message=str(error)))
        return error.exit_code
    return 0


def _teller(out: IO[bytes]) -> Tell:
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            out.write(msgspec.json.encode(event) + b"\n")

    return tell


if __name__ == "__main__":
    sys.exit(main())
