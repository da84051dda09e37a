"""A group: sessions that run as one batch, usually the children of one fork.

The engine sees one request of N sequences, so the batch's shape (and with it the bits) depends on the group alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from thaw.core.errors import InvalidRequest
from thaw.core.proof import Proof
from thaw.engines.base import Completion, GenerateRequest
from thaw.repo import chat as chats
from thaw.repo import talk
from thaw.repo.chat import ChatResult
from thaw.repo.commit import CommitResult
from thaw.repo.context import Context
from thaw.repo.guard import ProcessBound
from thaw.repo.messages import Messages, Tool
from thaw.repo.stream import Stream
from thaw.repo.work import generate

if TYPE_CHECKING:
    from thaw.repo.session import Session


class Group(ProcessBound, Sequence["Session"]):
    """Immutable list of sessions of one engine. `close` closes them all; so does leaving its `with`."""

    def __init__(self, context: Context, sessions: Sequence[Session]) -> None:
        super().__init__("group")
        self._context = context
        self._sessions = tuple(sessions)

    @overload
    def __getitem__(self, index: int) -> Session: ...
    @overload
    def __getitem__(self, index: slice) -> Group: ...
    def __getitem__(self, index: int | slice) -> Session | Group:
        if isinstance(index, slice):
            return Group(self._context, self._sessions[index])
        return self._sessions[index]

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    @property
    def proofs(self) -> tuple[Proof | None, ...]:
        return tuple(session.proof for session in self._sessions)

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        sampling: object = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Completion]:
        """Run every session in ONE batch: one prompt (and sampling) for all, or one each. Results in order."""
        return self.stream(prompts, sampling, token_ids=token_ids).result()

    def stream(
        self,
        prompts: str | Sequence[str] = "",
        sampling: object = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
    ) -> Stream[list[Completion]]:
        """As `generate`: deltas carry the session's `index` in the group."""
        texts = self._each("prompts", prompts, (str,))
        params = self._each("sampling", sampling, ())
        ids = [None] * len(self) if token_ids is None else self._each("token_ids", token_ids, ())
        return self._run(
            [s.request(t, p, token_ids=i) for s, t, p, i in zip(self._sessions, texts, params, ids, strict=True)]
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: object = None,
        *,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        keep_sampled: bool = False,
        continue_final_message: bool = False,
    ) -> list[ChatResult]:
        """Append messages to every session's conversation and answer, in ONE batch; as `Session.chat`.

        A string, a message or a list of messages is for all; a list of strings or of such lists has one each. Where one
        session cannot continue with its messages, none does."""
        return self.chat_stream(
            messages,
            sampling,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            keep_sampled=keep_sampled,
            continue_final_message=continue_final_message,
        ).result()

    def chat_stream(
        self,
        messages: Messages | Sequence[Messages],
        sampling: object = None,
        *,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        keep_sampled: bool = False,
        continue_final_message: bool = False,
    ) -> Stream[list[ChatResult]]:
        """As `chat`: deltas carry the session's `index` in the group."""
        self._check()
        for_all = not isinstance(messages, (list, tuple)) or all(isinstance(one, Mapping) for one in messages)
        each: list[Any] = [messages] * len(self) if for_all else self._each("messages", messages, ())
        engine = self._context.engine
        asks = [
            chats.ask(
                engine.codec,
                one,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                keep_sampled=keep_sampled,
                continue_final_message=continue_final_message,
            )
            for one in each
        ]
        return talk.stream(self._context, self._sessions, asks, self._each("sampling", sampling, ()), list)

    def resume(self) -> list[Completion]:
        """Go on with every session's interrupted completion, in one batch."""
        return self.resume_stream().result()

    def resume_stream(self) -> Stream[list[Completion]]:
        return self._run([GenerateRequest(session=session.ref, resume=True) for session in self._sessions])

    def commit(self, branch_prefix: str, message: str = "") -> list[CommitResult]:
        """Commit each session to a branch of its own: PREFIX/0, PREFIX/1, …"""
        return [session.commit(message, branch=f"{branch_prefix}/{i}") for i, session in enumerate(self._sessions)]

    def close(self) -> None:
        for session in self._sessions:
            session.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Group of {len(self)} sessions>"

    def _run(self, requests: list[GenerateRequest]) -> Stream[list[Completion]]:
        self._check()
        return generate(self._context, requests, lambda done: done)

    def _check(self) -> None:
        self.check_process()
        if not self._sessions:
            raise InvalidRequest("the group is empty; there is nothing to run")

    def _each(self, name: str, value: object, scalars: tuple[type, ...]) -> list:  # type: ignore[type-arg]
        """`value` once a session: a list or tuple has one each, anything else holds for all."""
        if isinstance(value, (list, tuple)) and not isinstance(value, scalars):
            if len(value) != len(self):
                raise InvalidRequest(f"{len(value)} {name} for {len(self)} sessions; give one for all, or one each")
            return list(value)
        return [value] * len(self)
