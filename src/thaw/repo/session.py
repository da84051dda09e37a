"""A session: a live, append-only token sequence in an engine, and its place in the repository.

What is shared: the context (store and engine), and KV with the sessions it was forked from. What is never kept here:
tokens and KV; the engine has them, and the properties ask it. A session remembers which commit it came from and which
leading part of it is stored, so that a commit writes only what is new.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from thaw.core.cache import keeps_all
from thaw.core.errors import Busy, EngineDied, InvalidRequest, NotFound, NotKept, ThawError, TooLong
from thaw.core.ids import CommitId, short
from thaw.core.objects import Turn
from thaw.core.proof import Proof
from thaw.core.sampling import Sampling
from thaw.core.text import require_text
from thaw.engines.base import Completion, Engine, GenerateRequest, Message, SessionRef, SessionView
from thaw.engines.text import left_open, text_after
from thaw.repo import chat as chats
from thaw.repo import chat_meta, conversation, refs, resolve, talk, work
from thaw.repo import commit as commits
from thaw.repo import hydrate as hydration
from thaw.repo import trajectory as trajectories
from thaw.repo.chat import ChatResult
from thaw.repo.commit import CommitResult, Expect
from thaw.repo.context import Context
from thaw.repo.group import Group
from thaw.repo.guard import ProcessBound
from thaw.repo.kept import Kept
from thaw.repo.messages import Messages, Tool
from thaw.repo.params import as_points, as_sampling, as_token
from thaw.repo.stream import Stream
from thaw.repo.trajectory import Trajectory
from thaw.store import Store


@dataclass(frozen=True)
class Aside:
    """A session as it was before a chat dropped its tokens from `keep` on: where to go back to if that fails."""

    ref: SessionRef
    kept: Kept
    last: tuple[CommitResult, tuple[Turn, ...]] | None
    num_inherited: int
    keep: int
    num_reread: int = 0
    """Tokens before `keep` that were prefilled again, since no state was kept there."""


class Session(ProcessBound):
    """Usable from any thread. Valid until `close`; closing the engine ends it too. Leaving its `with` closes it."""

    def __init__(
        self,
        context: Context,
        ref: SessionRef,
        *,
        kept: Kept | None = None,
        parent: CommitId | None = None,
        branch: str | None = None,
        proof: Proof | None = None,
        num_inherited: int = 0,
        stale_kv: bool = False,
    ) -> None:
        """`num_inherited`: how many tokens it begins with. `stale_kv`: the engine was asked for `keep_stale_kv`."""
        super().__init__("session")
        self._context = context
        self._ref = ref
        self._kept = kept or Kept()
        self._parent = parent
        self._branch = branch
        self._proof = proof
        self._num_inherited = num_inherited
        self._stale_kv = stale_kv
        self._last: tuple[CommitResult, tuple[Turn, ...]] | None = None
        self._aside: Aside | None = None
        self._lock = threading.RLock()
        self._closed = False
        context.admission.enter(self)

    # -- what it is

    @property
    def ref(self) -> SessionRef:
        """The engine's name of this session. Raises `InvalidRequest` after `close`."""
        self.check_process()
        if self._closed:
            raise InvalidRequest("this session is closed; open its point again with repo.session(…)")
        return self._ref

    @property
    def engine_ref(self) -> SessionRef:
        """As `ref`, of a session that was closed as well. Another one after a chat that dropped tokens."""
        return self._ref

    def view(self) -> SessionView:
        """The session as of the engine's last step boundary, all of one moment."""
        return self._context.engine.view(self.ref)

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.view().tokens

    @property
    def num_tokens(self) -> int:
        return len(self.view().tokens)

    @property
    def num_kv(self) -> int:
        return self.view().num_kv

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.view().turns

    @property
    def text(self) -> str:
        """The turns' texts, joined: prompts as given, completions as the caller saw them."""
        return "".join(turn.text for turn in self.view().turns)

    @property
    def messages(self) -> list[Message]:
        """The conversation that it holds: what was appended as messages, and the answers."""
        view = self.view()
        held = conversation.read(view.turns, len(view.tokens))
        return ((held.untold and self._told_earlier(view)) or held).messages

    @property
    def seed(self) -> int:
        return self.view().seed

    @property
    def proof(self) -> Proof | None:
        """How it came to have its KV; None for a session that was never restored or forked, and kept none over a policy
        step."""
        if self._proof is not None and not self._stale_kv:
            return self._proof
        return self.view().proof or self._proof

    @property
    def parent(self) -> CommitId | None:
        """The commit it was hydrated from or last committed as; the next commit's parent."""
        return self._parent

    @property
    def branch(self) -> str | None:
        """The branch that `commit()` moves; None on no branch."""
        return self._branch

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return not self._closed

    @property
    def num_inherited(self) -> int:
        """How many tokens it began with: of a fork or a hydrated session, its parent's."""
        return self._num_inherited

    @property
    def namespace(self) -> str:
        """The namespace that it commits to; "" is the default one."""
        return self._context.store.namespace

    @property
    def engine(self) -> Engine:
        """The engine that it lives in."""
        return self._context.engine

    def commits_to(self, store: Store) -> bool:
        """Whether it commits to this store, in its namespace."""
        own = self._context.store
        return (own.uuid, own.namespace) == (store.uuid, store.namespace)

    def reparent(self, commit: CommitId | None) -> None:
        """What the next commit follows in history, where that is not what this session was hydrated or forked from;
        None: nothing. Raises `NotFound` unless it is a commit of this repository and namespace."""
        if commit is not None:
            resolve.at(self._context.store, commit)
        with self._lock:
            self._parent = commit

    def kept_at(self, num_kv: int) -> Kept:
        """What of its first `num_kv` tokens that repository has."""
        with self._lock:
            return self._kept.cut(num_kv)

    def trajectory(self) -> Trajectory:
        """What was sampled here, as training data, all of one moment; also while it generates, and when its KV is of
        another policy by now. `own_mask` leaves out what it began with: of a fork, its parent's tokens."""
        view = self.view()
        return msgspec.structs.replace(
            trajectories.of_turns(view.tokens, view.turns, self._num_inherited), kv_ranges=view.kv_ranges
        )

    def keep_stale_kv(self) -> None:
        """From here on keep the KV when the policy or the weights change, and go on with it as it is; also where they
        have changed already. `trajectory().kv_ranges`, `proof.kv_ranges` and what is committed then say which weights
        computed it. Children of a fork do the same. Raises `Unsupported` where the engine, or the model, cannot."""
        hydration.require_stale_kv(self._context.engine)
        with self._lock:
            self._context.engine.keep_stale_kv(self.ref)
            self._stale_kv = True

    # -- going on

    def append(
        self,
        text: str = "",
        *,
        token_ids: Sequence[int] | None = None,
        role: str | None = None,
        messages: Messages | None = None,
        history: Messages | None = None,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        add_generation_prompt: bool = False,
        points: Sequence[int] = (),
        unaligned: bool = False,
    ) -> SessionView:
        """Prefill text, tokens or chat messages at the end, as one prompt turn. Returns when its KV is there.

        `points`: tokens of the session, inside or at the end of what is appended, that are to be forked from later.
        Only models with recurrent layers need to be told; there each must be a multiple of what the model's kernel
        reads at a time (the refusal says of what), unless `unaligned`.

        `messages` are appended to the conversation as by `chat`, and nobody answers yet; `history` gives it whole
        instead, as there. `add_generation_prompt`: up to where the answer begins, so that `generate` answers."""
        if messages is not None or history is not None:
            if text or token_ids is not None or role is not None:
                raise InvalidRequest("messages stand alone: leave text, token_ids and role out")
            asked = chats.ask(
                self._context.engine.codec,
                messages,
                history=history,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                answer=add_generation_prompt,
            )
            return self._append_messages(asked, points, unaligned)
        if tools is not None or chat_template_kwargs is not None or add_generation_prompt:
            raise InvalidRequest(
                "tools, chat_template_kwargs and add_generation_prompt belong to messages=… or history=…; plain text "
                "has no template"
            )
        ids, shown = self.encode(text, token_ids)
        self._keep_points(self.num_tokens, len(ids), points, unaligned)
        return work.append(self._context, self.ref, ids, text=shown, role=role)

    def keep_points(self, points: Sequence[int], *, unaligned: bool = False) -> None:
        """As `points` of `append`, for whatever is read or generated next: tokens of the session that are to come."""
        start = self.num_tokens
        self._keep_points(start, self._context.engine.info.max_model_len - start, points, unaligned)

    def _keep_points(self, start: int, count: int, points: Sequence[int], unaligned: bool) -> None:
        """Ask the engine for the states at `points`, which must be among the next `count` tokens."""
        wanted = as_points(points)
        outside = [point for point in wanted if not start < point <= start + count]
        if outside and count < 1:
            raise InvalidRequest(f"points {outside[:5]}: no token comes after the {start} that are there")
        if outside:
            raise InvalidRequest(
                f"points {outside[:5]}: a point is a number of tokens of the whole session, here one of "
                f"{start + 1}..{start + count}, which are still to be read"
            )
        engine = self._context.engine
        if wanted and not keeps_all(engine.info.groups):
            engine.keep_points(self.ref, wanted, unaligned=unaligned)

    def generate(
        self, prompt: str = "", sampling: object = None, *, token_ids: Sequence[int] | None = None
    ) -> Completion:
        """Append the prompt, if any, and generate."""
        return self.stream(prompt, sampling, token_ids=token_ids).result()

    def stream(
        self, prompt: str = "", sampling: object = None, *, token_ids: Sequence[int] | None = None
    ) -> Stream[Completion]:
        """As `generate`: iterate for the deltas, `result()` is the completion."""
        return self._run(self.request(prompt, sampling, token_ids=token_ids))

    def resume(self) -> Completion:
        """Go on with the completion that was interrupted or captured in the middle; the result is the whole turn."""
        return self.resume_stream().result()

    def resume_stream(self) -> Stream[Completion]:
        return self._run(GenerateRequest(session=self.ref, resume=True))

    def chat(
        self,
        messages: Messages | None = None,
        sampling: object = None,
        *,
        history: Messages | None = None,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        keep_sampled: bool = False,
        continue_final_message: bool = False,
    ) -> ChatResult:
        """Append `messages` to the session's conversation and answer; a string is what the user says.

        `history` gives the conversation whole instead. Either way only what the session does not say yet is prefilled.
        Where the template leaves out what it said before (thinking in earlier answers), the session goes on without it,
        by a fork, and the result says so; `keep_sampled` keeps what was sampled.

        `tools` (JSON schemas or documented functions) and `chat_template_kwargs` (the template's own variables, such as
        enable_thinking) hold for the conversation until they are set again. `continue_final_message`: the last message
        is the beginning of the answer.

        Raises `InvalidRequest`, with the session as it was, where a message would be lost or the template refuses.
        """
        return self.chat_stream(
            messages,
            sampling,
            history=history,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            keep_sampled=keep_sampled,
            continue_final_message=continue_final_message,
        ).result()

    def chat_stream(
        self,
        messages: Messages | None = None,
        sampling: object = None,
        *,
        history: Messages | None = None,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        keep_sampled: bool = False,
        continue_final_message: bool = False,
    ) -> Stream[ChatResult]:
        """As `chat`: iterate for the deltas, `result()` is the `ChatResult`."""
        asked = chats.ask(
            self._context.engine.codec,
            messages,
            history=history,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            keep_sampled=keep_sampled,
            continue_final_message=continue_final_message,
        )
        return talk.stream(self._context, [self], [asked], [sampling], lambda results: results[0])

    def plan_chat(self, asked: chats.ChatRequest) -> chats.Plan:
        """How this session would continue with it. Changes nothing; raises what `chat` raises."""
        engine, view = self._context.engine, self.view()
        if view.running:
            raise Busy("the session is generating; wait for its result, cancel it, or fork it")
        plan = chats.plan(engine.codec, view, asked, lambda: self._told_earlier(view), self._context.encode_chat)
        num_tokens, limit = plan.keep + len(plan.new), engine.info.max_model_len
        if num_tokens >= limit:
            raise TooLong(
                f"the conversation has {num_tokens} tokens and the engine takes {limit}, the answer included; the "
                "session is as it was. Begin another one with fewer messages."
            )
        return plan

    def follow(self, plan: chats.Plan, sampling: Sampling) -> GenerateRequest:
        """This session's part of a batch that answers; what the plan drops is set aside until `settle_chat`."""
        self._set_aside(plan.keep)
        return GenerateRequest(
            session=self.ref,
            prompt=plan.new,
            prompt_text=self._shown(plan),
            role=plan.role,
            chat=plan.chat,
            sampling=sampling,
        )

    @property
    def num_reread(self) -> int:
        """Tokens that were prefilled again to drop what a plan drops; until `settle_chat`."""
        return 0 if self._aside is None else self._aside.num_reread

    def settle_chat(self, *, failed: bool) -> None:
        """The batch is over: forget what was set aside, or, where it failed before it appended anything, go back.
        Nothing to do where nothing was set aside, or the engine is gone."""
        with self._lock, contextlib.suppress(EngineDied):
            aside, self._aside = self._aside, None
            if aside is None:
                return
            unwanted, engine = aside.ref, self._context.engine
            if failed and not self._closed and len(engine.view(self._ref).tokens) == aside.keep:
                unwanted, self._ref, self._kept, self._last = self._ref, aside.ref, aside.kept, aside.last
                self._num_inherited = aside.num_inherited
            engine.close_session(unwanted)

    def _append_messages(self, asked: chats.ChatRequest, points: Sequence[int], unaligned: bool) -> SessionView:
        plan = self.plan_chat(asked)
        self._set_aside(plan.keep)
        try:
            self._keep_points(plan.keep, len(plan.new), points, unaligned)
        except ThawError:
            self.settle_chat(failed=True)
            raise
        try:
            view = work.append(
                self._context, self.ref, plan.new, text=self._shown(plan), role=plan.role, chat=plan.chat
            )
        except ThawError:
            self.settle_chat(failed=True)
            raise
        self.settle_chat(failed=False)
        return view

    def _shown(self, plan: chats.Plan) -> str:
        return text_after(self._context.engine.codec, plan.before, plan.new, skip_special_tokens=False)

    def _told_earlier(self, view: SessionView) -> conversation.Conversation | None:
        """The conversation as commits of an older thaw recorded it, if they did up to where this session came from, and
        gc has not removed those."""
        try:
            found = chat_meta.read(self._context.store, self._parent)
        except NotFound:
            return None
        if found is None or found[1] > len(view.tokens):
            return None
        return conversation.read(view.turns, len(view.tokens), found)

    def request(self, prompt: str, sampling: object, *, token_ids: Sequence[int] | None = None) -> GenerateRequest:
        """One session's part of a batch."""
        params = as_sampling(sampling)
        ids, shown = self.encode(prompt, token_ids)
        return GenerateRequest(session=self.ref, prompt=tuple(ids), prompt_text=shown, sampling=params)

    def encode(self, text: str, token_ids: Sequence[int] | None) -> tuple[list[int], str]:
        """(token ids, their text) of what is to be appended here."""
        codec = self._context.engine.codec
        if token_ids is None and not text:
            return [], ""
        tokens = self.tokens
        if token_ids is None:
            return codec.encode(require_text(text, "the text"), first=not tokens), left_open(codec, tokens) + text
        if text:
            raise InvalidRequest("text and token_ids are both given; give one of the two")
        return list(token_ids), text_after(codec, tokens, token_ids, skip_special_tokens=False)

    def _run(self, request: GenerateRequest) -> Stream[Completion]:
        return work.generate(self._context, [request], lambda done: done[0])

    def _set_aside(self, keep: int) -> None:
        """Go on from token `keep`, if that is not the end: this object moves to a fork and keeps the longer session."""
        self.settle_chat(failed=False)
        engine, old = self._context.engine, self.ref
        if keep == len(engine.view(old).tokens):
            return
        again = False
        try:
            new = engine.fork(old, 1, at=keep, replay=True).result()[0]
        except NotKept:
            new, again = engine.reread(old, keep).result(), True
        self._pass_on(new)
        kept, proof = self._kept_of(engine.view(new))
        num_reread = proof.num_recomputed_tokens if again and proof is not None else 0
        with self._lock:
            self._aside = Aside(old, self._kept, self._last, self._num_inherited, keep, num_reread)
            self._ref, self._kept, self._last = new, kept, None
            self._num_inherited = min(self._num_inherited, keep)

    # -- git's verbs

    def commit(
        self,
        message: str = "",
        branch: str | None = None,
        meta: Mapping[str, str] | None = None,
        expect: Expect = "parent",
        with_weights: bool = False,
    ) -> CommitResult:
        """Store the session as it stands, also in the middle of a generation, and move the branch to it.

        `branch` None: the session's own; on no branch the commit is reachable by its id, and kept from gc as long as
        reflogs are. Durable when this returns. Raises `CommitConflict` (the commit is kept) when the branch is not
        where `expect` says: at the session's parent, unless told otherwise.

        `with_weights`: put the model's weights into the repository first, unless they are there (`repo.weights`).
        Raises `IdentityMismatch` where the model's files are not what runs; nothing is committed then.
        """
        if with_weights:
            from thaw.repo.weights import keep_weights

            keep_weights(self._context)
        return self._commit(message, branch or self._branch, commits.check_meta(meta), expect, "commit")

    def snapshot(self, message: str = "", meta: Mapping[str, str] | None = None) -> CommitResult:
        """As `commit`, on no branch, and nothing else changes: the branch stays, and the parent of the next commit."""
        with self._lock:
            parent, branch = self._parent, self._branch
            try:
                return self._commit(message, None, commits.check_meta(meta), "any", "snapshot")
            finally:
                self._parent, self._branch = parent, branch

    def fork(self, n: int, at: int | None = None, replay: bool = False) -> Group:
        """N sessions that continue here, or at token `at`; no KV is copied and nothing is written. Raises `NotKept`
        for a token without a state, on models with recurrent layers; `reread` goes on there."""
        engine = self._context.engine
        token = None if at is None else as_token("at", at)
        with self._context.admission.beginning():
            refs = engine.fork(self.ref, n, at=token, replay=replay).result()
        for ref in refs:
            self._pass_on(ref)
        view = engine.view(refs[0])
        kept, begun = self._kept.cut(view.num_kv), len(view.tokens)
        children = [
            Session(
                self._context, ref, kept=kept, parent=self._parent, num_inherited=begun, stale_kv=self._stale_kv
            )
            for ref in refs
        ]  # fmt: skip
        return Group(self._context, children)

    def _pass_on(self, child: SessionRef) -> None:
        """What was asked for of this session holds for those that come from it."""
        if self._stale_kv:
            self._context.engine.keep_stale_kv(child)

    def reread(self, at: int) -> Session:
        """A session of the first `at` tokens, where `fork` raises `NotKept`: it starts at the nearest earlier point
        and prefills the rest again, which its proof counts. Forks of it read nothing again."""
        token = as_token("at", at)
        with self._context.admission.beginning():
            ref = self._context.engine.reread(self.ref, token).result()
        self._pass_on(ref)
        kept, proof = self._kept_of(self._context.engine.view(ref))
        return Session(
            self._context,
            ref,
            kept=kept,
            parent=self._parent,
            proof=proof,
            num_inherited=token,
            stale_kv=self._stale_kv,
        )

    def _kept_of(self, view: SessionView) -> tuple[Kept, Proof | None]:
        """What of a child the store has, which is nothing of what the child read again; and the child's proof."""
        proof = view.proof
        again = proof is not None and proof.num_recomputed_tokens > 0
        return self._kept.cut(proof.num_cached_tokens if again and proof is not None else view.num_kv), proof

    def adopt(self, branch: str, message: str = "") -> CommitResult:
        """Commit (if anything is new) and make it the branch, whatever the branch was; the old tip stays in its reflog.

        Raises `CommitConflict` if the branch moves while this runs."""
        with self._lock:
            last = self.committed()
            if last is not None and not message:
                point = resolve.at(self._context.store, last.commit)
                refs.move(self._context.store, branch, point, f"adopt: {short(last.commit)}")
                self._branch = branch
                return msgspec.structs.replace(last, branch=branch, nbytes_written=0, stages={})
            tip = self._context.store.ref(branch)
            before = tip.target if tip is not None else None
            return self._commit(message or "adopted", branch, {}, before, "adopt")

    def park(self) -> SessionView:
        """Let the engine have this session's memory; the next use brings the KV back."""
        return self._context.engine.park(self.ref).result()

    def close(self) -> None:
        """Forget the live session; running work on it is cancelled, commits stay. Closing twice is fine."""
        self.check_process()
        if not self._closed:
            self.settle_chat(failed=False)
            self._closed = True
            self._context.engine.close_session(self._ref)

    def committed(self) -> CommitResult | None:
        """The last commit of this session, if nothing was added since and it is still stored."""
        with self._lock:
            last, view = self._last, self.view()
            if last is None or last[0].num_tokens != len(view.tokens) or last[1] != view.turns:
                return None
            return last[0] if self._context.store.has(last[0].commit) else None

    def _commit(
        self, message: str, branch: str | None, meta: dict[str, str], expect: Expect, reason: str
    ) -> CommitResult:
        with self._lock:
            request = commits.Request(
                session=self.ref,
                parent=self._parent,
                message=message,
                branch=branch,
                meta=meta,
                expect=expect,
                reason=reason,
            )
            done = commits.write(self._context, request, self._kept)
            self._kept = done.kept
            if done.conflict is not None:
                raise done.conflict
            self._parent, self._branch = done.result.commit, branch
            self._last = (done.result, done.captured.turns)
            return done.result

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "closed" if self._closed else f"from {short(self._parent)}" if self._parent else "new"
        return f"<Session {where}{f' on {self._branch}' if self._branch else ''}>"
