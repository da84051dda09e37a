"""Running a model at the command line: boot, read with progress, stream text, stop at ^C.

The model's text goes to stdout as it comes, on a terminal without control characters; everything else to stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from thaw.cli import boot, output, place, words
from thaw.cli.progress import Progress

if TYPE_CHECKING:
    from thaw.engines.base import Completion, Delta, Message
    from thaw.repo.chat import ChatResult
    from thaw.repo.commit import CommitResult
    from thaw.repo.repository import Repository
    from thaw.repo.session import Session
    from thaw.repo.stream import Stream

T = TypeVar("T")


@contextmanager
def opened(
    named: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    check: Callable[[Repository], object] = lambda _: None,
) -> Iterator[Repository]:
    """The repository with its engine booted; it remembers what was named here if all went well. Closes both. `check` is
    asked of the repository before a model is loaded, and raises for what cannot work."""
    from thaw.repo.repository import open as open_at
    from thaw.repo.settings import remember

    place.require_sessions()
    path = place.find(named)
    named_one = any(value is not None for value in (engine_name, model, dtype, device))
    with open_at(path, create=False) as look:
        check(look if place.namespace() is None else look.within(str(place.namespace())))
        chosen = boot.choose(look.store, engine_name, model, dtype, device)
    with boot.boot(chosen) as engine, open_at(path, engine=engine, create=False, namespace=place.namespace()) as repo:
        yield repo
        if named_one:
            remember(repo.store, chosen)


def read(session: Session, text: str, name: str) -> None:
    """Prefill a text as one prompt turn, with progress in tokens."""
    ids, _ = session.encode(text, None)
    if ids:
        start = session.num_kv
        with Progress(f"reading {name}", lambda: _far(session, start, len(ids))):
            session.append(text)


def _far(session: Session, start: int, n: int) -> str:
    return f"{min(max(session.num_kv - start, 0), n):,} of {words.count(n, 'token')}"


def generate(session: Session, prompt: str, sampling: Any, *, quiet: bool) -> tuple[Completion, bool]:
    """Generate after `prompt`; with none, resume a completion that was cut, or just go on. (result, interrupted)."""
    if not prompt and session.num_tokens:
        last = session.turns[-1] if session.turns else None
        if last is not None and last.kind == "completion" and last.finish_reason in (None, "abort"):
            return follow(session.resume_stream(), quiet=quiet)
    return follow(session.stream(prompt, sampling), quiet=quiet)


def chat(
    session: Session, messages: list[Message] | None, sampling: Any, *, quiet: bool, **arguments: Any
) -> tuple[ChatResult, bool]:
    """Answer the messages. (result, interrupted)."""
    return follow(session.chat_stream(messages, sampling, **arguments), quiet=quiet)


def follow(stream: Stream[T], *, quiet: bool) -> tuple[T, bool]:
    """Show the text as it comes. At ^C the generation ends with what it has. (result, interrupted)."""
    interrupted = False
    try:
        _show(iter(stream), quiet)
    except KeyboardInterrupt:
        interrupted = True
        stream.cancel()
    finally:
        if not quiet:
            output.write("\n", flush=True)
    return stream.result(), interrupted


def _show(deltas: Iterator[Delta], quiet: bool) -> None:
    shown = _shower(quiet)
    with Progress("reading the prompt" if not quiet else "generating"):
        first = next(deltas, None)
        if quiet:
            for _ in deltas:
                pass
    if first is not None:
        shown(first.text)
        for delta in deltas:
            shown(delta.text)


def _shower(quiet: bool) -> Callable[[str], None]:
    import sys

    if quiet:
        return lambda text: None
    safe = output.clean if output.is_terminal(sys.stdout) else str
    return lambda text: output.write(safe(text), flush=True)


def spoken(completion: Completion | None) -> str:
    """`, 40 generated in 3.10 s (first after 412 ms), 3,411 cached, 12 prefilled, ended by length`."""
    if completion is None:
        return ""
    usage = completion.usage
    return (
        f"; {usage.num_completion_tokens:,} generated in {words.seconds(completion.total_s)} "
        f"(first after {words.seconds(completion.ttft_s)}), {usage.num_cached_tokens:,} cached, "
        f"{usage.num_prefilled_tokens:,} prefilled, ended by {completion.finish_reason}"
    )


def plain(done: CommitResult, completion: Completion | None, session: Session) -> dict[str, object]:
    """What --json says of one session that was committed."""
    said: dict[str, object] = {"text": None, "token_ids": [], "finish_reason": None}
    if completion is not None:
        said = {name: getattr(completion, name) for name in completion.__struct_fields__ if name != "session"}
        said["seed"] = str(completion.seed)
    fields = {name: getattr(done, name) for name in done.__struct_fields__}
    return {**fields, **said, "proof": session.proof}
