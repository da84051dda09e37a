"""Chat: messages in, an answer out; only what the session does not say yet is prefilled.

`chat(new)` appends messages to the conversation that the session holds; `chat(history=…)` gives the conversation whole.
Either is rendered by the model's own template, all of it, and laid beside the session's tokens:

    the session says the beginning of it     the rest is appended; where only the tokens of a sampled answer differ, and
                                             not its text, the sampled ones stay
    the template now leaves something out    (thinking in earlier answers): the session continues from the last common
                                             token, by a fork, and the result says so; `keep_sampled` keeps it instead
    a message would be lost                  an error, before anything is changed

The messages, tools and template variables are recorded with the turn that they became, so that a session which was
forked, cut, committed and opened elsewhere goes on as well. So is the time that a template reads: tomorrow the
conversation still begins with the day on which it began.

Plain text that was appended between messages stays where it is; what follows is then rendered from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta

import msgspec

from thaw.core import canonical
from thaw.core.errors import InvalidRequest, TooLong, Unsupported
from thaw.core.objects import Chat, Turn
from thaw.engines.base import Codec, Completion, Message, SessionView
from thaw.engines.text import cut_turns
from thaw.repo import conversation, messages, said
from thaw.repo.align import Aligned, align, said_end
from thaw.repo.conversation import Conversation, MessageSpan, TemplateSettings
from thaw.repo.marks import Marks
from thaw.repo.messages import Messages, Tool

__all__ = ["ChatRequest", "ChatResult", "Message", "Messages", "Plan", "Tool", "ask", "plan"]

MAX_NBYTES = canonical.MAX_OBJECT_BYTES // 4
"""Of the messages of one turn. Its object has them and, as text, what they became."""
EARLIER = timedelta(days=400, hours=5, minutes=7)
HERE, END = 8**8 - 1, 8**8 - 2
"""Numbers of the marks for where something stands; those that ask whether something is said count from 0."""


class ChatResult(msgspec.Struct, frozen=True, kw_only=True):
    """A completion, and what became of the session to get it.

    `num_new_tokens` were appended. `forked_at`: None when the session's tokens were all kept, else the token from which
    it went on; the `num_dropped_tokens` after it are no longer part of this session, and `num_dropped_sampled` of them
    were sampled. `num_dropped_messages` of the session's are not in the conversation that was given as `history`: all
    from the first one that differs, told in other words or not, unless its tokens were kept. `message` is the answer,
    to append to the conversation; one that continued a message is all of it.
    """

    completion: Completion
    message: Message
    num_new_tokens: int
    forked_at: int | None = None
    num_dropped_tokens: int = 0
    num_dropped_sampled: int = 0
    num_dropped_messages: int = 0

    @property
    def text(self) -> str:
        """What was generated now."""
        return self.completion.text


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller wants, checked. `whole`: these messages are the conversation, else they are appended to it.
    `tools`, `variables` None: as before. `answer`: the assistant speaks next."""

    messages: tuple[Message, ...]
    whole: bool = False
    tools: tuple[Message, ...] | None = None
    variables: dict[str, object] | None = None
    keep_sampled: bool = False
    continue_final_message: bool = False
    answer: bool = True


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Keep the session's first `keep` tokens, `before`, drop `num_dropped`, then append `new`, which is recorded as
    `chat`. `final`: the message that the answer completes, if it completes one."""

    keep: int
    before: tuple[int, ...]
    new: tuple[int, ...]
    role: str
    chat: Chat
    num_dropped: int
    num_dropped_sampled: int
    num_dropped_messages: int
    final: Message | None

    def result(self, completion: Completion) -> ChatResult:
        """What the caller gets once the answer is there."""
        answer: Message = {"role": "assistant", "content": completion.text}
        return ChatResult(
            completion=completion,
            message=answer if self.final is None else conversation.completed(self.final, completion.text),
            num_new_tokens=len(self.new),
            forked_at=self.keep if self.num_dropped else None,
            num_dropped_tokens=self.num_dropped,
            num_dropped_sampled=self.num_dropped_sampled,
            num_dropped_messages=self.num_dropped_messages,
        )


def ask(
    codec: Codec,
    new: Messages | None,
    *,
    history: Messages | None = None,
    tools: Sequence[Tool] | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
    keep_sampled: bool = False,
    continue_final_message: bool = False,
    answer: bool = True,
) -> ChatRequest:
    """The caller's arguments, checked. Raises `InvalidRequest`."""
    if (new is None) == (history is None):
        raise InvalidRequest("chat: give either the new messages, or the whole conversation as history=…")
    given = messages.checked(new, "messages") if new is not None else messages.checked(history or (), "history")
    if not given:
        raise InvalidRequest("chat: no messages; give what is to be answered")
    if continue_final_message and given[-1]["role"] != "assistant":
        raise InvalidRequest(
            f"continue_final_message: the last message is the {given[-1]['role']}'s; end with the beginning of the "
            "assistant's answer"
        )
    if continue_final_message and given[-1].get("tool_calls"):
        raise InvalidRequest(
            "continue_final_message: the last message calls tools, and its text would continue before them; leave "
            "tool_calls out"
        )
    return ChatRequest(
        messages=given,
        whole=new is None,
        tools=messages.checked_tools(tools, codec),
        variables=messages.checked_variables(chat_template_kwargs),
        keep_sampled=keep_sampled,
        continue_final_message=continue_final_message,
        answer=answer,
    )


def plan(
    codec: Codec,
    view: SessionView,
    asked: ChatRequest,
    earlier: Callable[[], Conversation | None],
    encode: Callable[[str], Sequence[int]] | None = None,
) -> Plan:
    """How the session is to go on. Changes nothing. `earlier` reads what an older thaw recorded elsewhere; `encode`
    does what the codec's `encode_chat` does, and may know it already.

    Raises `InvalidRequest` where a message would be lost, the template refuses, or the session's conversation is not
    known; `Unsupported` where the model has no template, or its template has no place for tools."""
    held = conversation.read(view.turns, len(view.tokens))
    if held.untold is not None:
        held = earlier() or held
    if not asked.whole:
        _check_append(held, asked)
    rendering = _Rendering(codec, view, held, asked)
    rendering.check_nothing_is_left_out()
    aligned = rendering.align(encode or codec.encode_chat)
    if not aligned.new and aligned.keep > rendering.start and not rendering.is_told_at(aligned.keep):
        aligned = Aligned(keep=aligned.keep - 1, new=view.tokens[aligned.keep - 1 : aligned.keep])
    if aligned.keep < held.plain_end and held.start < held.plain_end:
        raise InvalidRequest(
            f"the session holds text that is not a message, up to token {held.plain_end}, and this conversation "
            f"diverges from it at token {aligned.keep}: the text would be lost. Append with chat(new), or begin "
            "another session."
        )
    return Plan(
        keep=aligned.keep,
        before=view.tokens[: aligned.keep],
        new=aligned.new,
        role=str(asked.messages[-1]["role"]),
        chat=_record(held, rendering, aligned.keep, asked),
        num_dropped=len(view.tokens) - aligned.keep,
        num_dropped_sampled=_num_sampled(view.turns, aligned.keep),
        num_dropped_messages=rendering.num_dropped_messages(aligned.keep),
        final=asked.messages[-1] if asked.continue_final_message else None,
    )


def _record(held: Conversation, rendering: _Rendering, keep: int, asked: ChatRequest) -> Chat:
    """What the new turn keeps: the messages that no turn before token `keep` does."""
    kept = rendering.kept_pieces(keep)
    chat = conversation.record(
        max(kept[-1].end, held.plain_end) if kept else rendering.start,
        rendering.messages[len(conversation.joined(kept)) :],
        None if kept and kept[-1].settings == rendering.settings else rendering.settings,
        open=asked.continue_final_message,
    )
    nbytes = sum(len(message.encode()) for message in chat.messages)
    if nbytes > MAX_NBYTES:
        raise TooLong(
            f"these messages are {nbytes} bytes; {MAX_NBYTES} are kept with one turn. Append them one by one, with "
            "append(messages=…), and chat with the last."
        )
    return chat


def _check_append(held: Conversation, asked: ChatRequest) -> None:
    if held.untold is not None:
        turn = held.untold
        raise InvalidRequest(
            f"tokens [{turn.start}, {turn.end}) of this session are the {turn.role}'s, but not as messages that could "
            "be rendered again (they were appended with role=…, cut through, or written by an older thaw), so what "
            "follows them is not known. Give the whole conversation with history=…"
        )
    known = held.messages
    if known and len(asked.messages) > len(known) and list(asked.messages[: len(known)]) == known:
        raise InvalidRequest(
            f"these messages begin with the {len(known)} that the session holds already; give the new ones alone, or "
            "the whole conversation as history=…"
        )


def _num_sampled(turns: Sequence[Turn], keep: int) -> int:
    return sum(turn.end - max(turn.start, keep) for turn in turns if turn.kind == "completion" and turn.end > keep)


class _Rendering:
    """The conversation as it is to be, its text, and how it lies beside the session's tokens."""

    def __init__(self, codec: Codec, view: SessionView, held: Conversation, asked: ChatRequest) -> None:
        self._codec, self._view, self._held, self._asked = codec, view, held, asked
        self.messages = list(asked.messages) if asked.whole else [*held.messages, *asked.messages]
        self.start = held.start if held.untold is None else min(held.start, held.untold.start)
        self.settings, whole = self._settled()
        self._marks = Marks(*(messages.written(given) for given in self._given()), whole)
        self._text = self._said(self.messages) if asked.continue_final_message else whole

    def _settled(self) -> tuple[TemplateSettings, str]:
        """The settings of the conversation, with what is given now, and the time of now if the template reads the time;
        and the text."""
        last, asked = self._held.settings, self._asked
        settings = TemplateSettings(
            tools=last.tools if asked.tools is None else asked.tools,
            variables={**last.variables, **(asked.variables or {})},
            moment=last.moment,
        )
        if settings.moment is not None:
            return settings, self._render(self.messages, settings)
        now = datetime.now().replace(microsecond=0)
        timed, other = (msgspec.structs.replace(settings, moment=moment) for moment in (now, now - EARLIER))
        text = self._render(self.messages, timed)
        return (settings if text == self._render(self.messages, other) else timed), text

    def _render(self, some: Sequence[Message], settings: TemplateSettings) -> str:
        return self._codec.chat_text(
            some,
            add_generation_prompt=self._asked.answer and not self._asked.continue_final_message,
            tools=settings.tools or None,
            variables=settings.variables,
            moment=settings.moment,
        )

    def _given(self) -> Iterator[object]:
        yield from self.messages
        yield from self.settings.tools
        yield self.settings.variables

    def _said(self, some: Sequence[Message]) -> str:
        """The text of these messages, up to where the last one is to be continued."""
        if not self._asked.continue_final_message:
            return self._render(some, self.settings)
        mark = self._marks.of(END)
        text = self._render([*some[:-1], conversation.completed(some[-1], mark)], self.settings)
        return self._parted(text, mark, len(some) - 1)[0]

    def _parted(self, text: str, mark: str, number: int) -> tuple[str, str]:
        """What stands before and behind the mark, which was put into message `number`."""
        before, *behind = text.split(mark)
        if not behind:
            raise self._left_out(number, "text")
        if len(behind) > 1:
            raise InvalidRequest(
                f"the model's chat template says the text of message {number} {len(behind)} times, so it is not known "
                "what goes on behind it. Leave keep_sampled and continue_final_message out; where plain text stands "
                "between messages, begin another session."
            )
        return before, behind[0]

    # -- nothing is lost

    def check_nothing_is_left_out(self) -> None:
        """Raise `InvalidRequest` for what messages say, and `Unsupported` for tools, that the template leaves out."""
        found = said.left_out(self.messages, self.settings.tools, self._render_with, self._text, self._marks)
        if found is None:
            return
        if found.message is None:
            raise Unsupported(f"the model's chat template has no place for tools; {found.value!r} would not be seen")
        raise self._left_out(found.message, found.what)

    def _render_with(self, some: Sequence[Message], tools: Sequence[Message]) -> str:
        return self._render(some, msgspec.structs.replace(self.settings, tools=tuple(tools)))

    def _left_out(self, number: int, what: str) -> InvalidRequest:
        role = self.messages[number]["role"]
        return InvalidRequest(
            f"the model's chat template leaves out the {what} of message {number} (role {role!r}): it would be lost. "
            "Say it in another way: in a role that the template knows, as text, or in another message."
        )

    # -- beside the session's tokens

    def align(self, encode: Callable[[str], Sequence[int]]) -> Aligned:
        """How far the session says it. What it says before the anchor, if there is one, is not compared."""
        view, anchor = self._view, self._anchor()
        if anchor is None:
            return align(self._codec, view.tokens, view.turns, self.start, encode(self._text))
        count, begin, least = anchor
        wanted = self._codec.encode_chat(self._text_behind(count - 1), inside=True)
        found = align(self._codec, view.tokens, view.turns, begin, wanted)
        return found if found.keep >= least else align(self._codec, view.tokens, view.turns, least, wanted)

    def _anchor(self) -> tuple[int, int, int] | None:
        """(messages, token up to which they are said, tokens to keep at least): what comes before stays as it is.

        Behind plain text, since no template renders it; behind the last answer, where what was sampled is kept."""
        held, view = self._held, self._view
        plain = held.plain_end if held.plain_end > held.start and not self._asked.whole else None
        answers = [i for i, piece in enumerate(held.pieces) if piece.sampled] if self._asked.keep_sampled else []
        if answers and (plain is None or held.pieces[answers[-1]].end > plain):
            answer = held.pieces[answers[-1]]
            count = len(conversation.joined(held.pieces[: answers[-1] + 1]))
            if not self._begins_alike(count):
                return None
            return count, said_end(self._codec, view.tokens, answer.begin, answer.end), answer.end
        if plain is None:
            return None
        return len(conversation.joined([p for p in held.pieces if p.end <= plain])), plain, plain

    def _begins_alike(self, count: int) -> bool:
        """Whether the first `count` messages are the session's; answers may be told in other words."""
        mine, theirs = self._held.messages[:count], self.messages[:count]
        return len(mine) == len(theirs) and all(
            a == b or a["role"] == b["role"] == "assistant" for a, b in zip(mine, theirs, strict=True)
        )

    def _text_behind(self, number: int) -> str:
        """What is said behind message `number`, of which the session has said all, calls of tools, too.

        Raises `InvalidRequest` where that is not known, or not all that follows is said there: some templates say the
        results of tools along with the calls."""
        rest = self.messages[number + 1 :]
        try:
            behind = self._said_behind(number, rest)
            lost = said.left_out(rest, (), lambda some, _: self._said_behind(number, some), behind, self._marks)
        except InvalidRequest:
            if not self.messages[number].get("tool_calls"):
                raise
            lost = None
        else:
            if lost is None:
                return behind
        with_it = "" if lost is None else f", since it says the {lost.what} of a later one only along with it"
        raise InvalidRequest(
            f"the session keeps message {number} as it was said, and the model's chat template does not tell what "
            f"stands behind it{with_it}. Leave keep_sampled out; where plain text stands between messages, begin "
            "another session."
        )

    def _said_behind(self, number: int, rest: Sequence[Message]) -> str:
        mark = self._marks.of(HERE)
        marked: Message = {"role": self.messages[number]["role"], "content": mark}
        return self._parted(self._said([*self.messages[:number], marked, *rest]), mark, number)[1]

    def is_told_at(self, keep: int) -> bool:
        """Whether the turns of the first `keep` tokens tell this conversation, so that no new one need record it."""
        turns = cut_turns(self._view.turns, self._view.tokens, keep, self._codec)
        told = conversation.read(turns, keep)
        return told.untold is None and (told.messages, told.settings) == (self.messages, self.settings)

    def num_dropped_messages(self, keep: int) -> int:
        """How many of the session's are not in this conversation, when the session keeps its first `keep` tokens."""
        held = self._held.messages
        kept = len(conversation.joined([piece for piece in self._held.pieces if piece.end <= keep]))
        for i, (mine, theirs) in enumerate(zip(held, self.messages, strict=False)):
            retold = i < kept and mine["role"] == theirs["role"]
            if mine != theirs and not retold:
                return len(held) - i
        return max(len(held) - len(self.messages), 0)

    def kept_pieces(self, keep: int) -> tuple[MessageSpan, ...]:
        """The pieces that stay as they are recorded, when the session keeps its first `keep` tokens."""
        pieces = [piece for piece in self._held.pieces if piece.end <= keep]
        while pieces and (pieces[-1].open or not self._begins_with(conversation.joined(pieces))):
            pieces.pop()
        return tuple(pieces)

    def _begins_with(self, some: Sequence[Message]) -> bool:
        return self.messages[: len(some)] == list(some)
