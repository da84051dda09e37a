"""Laws of chat: what is appended, what is kept with the session, and that no message is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import BadSampling, Busy, InvalidRequest, ThawError, TooLong, Unsupported
from thaw.core.objects import ChatTurn
from thaw.engines.base import Engine
from thaw.engines.content import text_parts
from thaw.repo import Repository, Session

GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
WILD = Sampling(temperature=1.0, max_tokens=12, ignore_eos=True)
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def rendered(session: Session, *more: dict[str, object], **options: Any) -> list[int]:
    """The session's conversation and `more`, as the template renders it whole."""
    return session.engine.codec.render_chat([*session.messages, *more], add_generation_prompt=True, **options)


def test_new_messages_are_appended_as_the_whole_conversation_would_be_rendered(repo: Repository) -> None:
    s = repo.session()
    first = s.chat([SYSTEM, user("hello")], GREEDY)
    assert s.messages == [SYSTEM, user("hello"), first.message]
    wanted = rendered(s, user("and?"))
    before = s.tokens
    second = s.chat("and?", GREEDY)
    assert list(s.tokens[: len(wanted)]) == wanted and s.tokens[: len(before)] == before
    assert (second.forked_at, second.num_dropped_tokens, second.num_dropped_sampled) == (None, 0, 0)
    assert second.completion.usage.num_prompt_tokens == len(wanted)
    assert second.completion.num_cached_tokens == len(before) - 1
    assert [turn.role for turn in s.turns] == ["user", "assistant", "user", "assistant"]


def test_one_message_a_list_and_a_string_are_the_same(repo: Repository) -> None:
    ways: list[Any] = ["hello", user("hello"), [user("hello")], (user("hello"),)]
    assert len({tuple(repo.session(seed=1).chat(way, GREEDY).completion.token_ids) for way in ways}) == 1


def test_a_sampled_answer_keeps_its_tokens_and_log_probabilities(repo: Repository) -> None:
    """Sampled bytes are no text that could be encoded to the same tokens again."""
    s = repo.session(seed=5)
    bytes_of_any_kind = Sampling(temperature=4.0, max_tokens=12, ignore_eos=True)
    for text in ("one", "two", "three"):
        result = s.chat(text, bytes_of_any_kind)
        assert result.num_dropped_tokens == 0
    assert "\ufffd" in s.text, "the seed was chosen so that some bytes are no text"
    t = s.trajectory()
    assert sum(t.mask) == 36 and t.prompt_ids + t.completion_ids == s.tokens
    assert [p for p, mask in zip(t.logprobs, t.mask, strict=True) if mask] == [
        p for turn in s.turns for p in turn.logprobs or ()
    ]
    whole = s.chat(history=[*s.messages, user("four")], sampling=WILD)
    assert whole.num_dropped_tokens == 0 and sum(s.trajectory().mask) == 48


def test_the_whole_conversation_goes_on_where_it_parts_from_the_session(repo: Repository) -> None:
    s = repo.session(seed=1)
    s.append("Plain text before the conversation stays.")
    plain = s.num_tokens
    s.chat("one", GREEDY)
    old = s.tokens
    result = s.chat(history=[user("one more")], sampling=GREEDY)
    assert result.forked_at == plain + 1 + len("user\none")
    assert result.num_dropped_tokens == len(old) - result.forked_at and result.num_dropped_sampled == 12
    assert s.tokens[: result.forked_at] == old[: result.forked_at]
    assert s.messages == [user("one more"), result.message]
    done = s.commit("after the fork", branch="main")
    assert repo.session(done.commit).tokens == s.tokens
    assert repo.session(done.commit).messages == s.messages


def test_the_same_conversation_again_answers_anew(repo: Repository) -> None:
    s = repo.session()
    first = s.chat("hello", GREEDY)
    again = s.chat(history=[user("hello")], sampling=GREEDY)
    assert again.text == first.text and again.forked_at == first.completion.usage.num_prompt_tokens
    assert again.num_dropped_sampled == 12 and s.messages == [user("hello"), again.message]


def test_a_conversation_that_ends_inside_a_prompt_of_the_session_is_recorded(repo: Repository) -> None:
    """All its tokens are there already, but no turn of the session ends where it does."""
    begun = {"role": "assistant", "content": "Well, "}
    for history, open in (
        ([user("hello")], False),
        ([user("hello"), {"role": "assistant", "content": "We"}], True),
        ([user("hello"), {"role": "assistant", "content": ""}], True),
    ):
        s = repo.session()
        s.chat([user("hello"), begun], GREEDY, continue_final_message=True)
        result = s.chat(history=history, sampling=GREEDY, continue_final_message=open)
        assert result.num_new_tokens == 1 and result.num_dropped_messages == 1
        assert s.messages == [user("hello"), result.message]
        assert repo.session(s.commit("x").commit).messages == s.messages
        wanted = rendered(s, user("and?"))
        assert s.chat("and?", GREEDY).forked_at is None and list(s.tokens[: len(wanted)]) == wanted
    s = repo.session()
    s.append(messages=[user("hello"), user("and?")], add_generation_prompt=True)
    s.generate("", GREEDY)
    answered = s.chat(history=[user("hello"), user("and?")], sampling=GREEDY)
    assert answered.num_new_tokens == 0, "where a turn ends there, nothing is said again"


def test_a_session_keeps_its_conversation_through_commit_fork_and_cut(repo: Repository) -> None:
    s = repo.session(seed=3)
    s.chat([SYSTEM, user("hello")], GREEDY)
    s.chat("and?", GREEDY)
    s.commit("two answers", branch="main")
    told = s.messages
    for other in (repo.session("main"), repo.fork("main", 1)[0], s.fork(1)[0]):
        assert other.messages == told
        wanted = rendered(other, user("why?"))
        assert other.chat("why?", GREEDY).forked_at is None and list(other.tokens[: len(wanted)]) == wanted
    for place, count in (("main:turn=1", 2), ("main:turn=2", 3), ("main:turn=3", 4)):
        cut = repo.session(place)
        assert cut.messages == told[:count]
        child = s.fork(1, at=cut.num_tokens)[0]
        assert child.messages == told[:count]
        assert [one.chat("why?", GREEDY).text for one in (cut, child)] == [cut.messages[-1]["content"]] * 2
    assert s.messages == told


def test_an_answer_that_was_cut_is_a_message_as_far_as_it_goes(repo: Repository) -> None:
    s = repo.session(seed=3)
    answer = s.chat("hello", GREEDY).text
    s.commit("answered", branch="main")
    at = s.turns[-1].start + 5
    cut = repo.session(f"main:token={at}")
    assert cut.messages == [user("hello"), {"role": "assistant", "content": answer[:5]}]
    wanted = rendered(cut, user("why?"))
    assert cut.chat("why?", GREEDY).forked_at is None and list(cut.tokens[: len(wanted)]) == wanted


def test_a_cut_through_a_message_cannot_be_appended_to(repo: Repository) -> None:
    s = repo.session()
    s.chat([SYSTEM, user("hello")], GREEDY)
    s.commit("x", branch="main")
    cut = repo.session("main:token=9")
    before = cut.tokens
    with pytest.raises(InvalidRequest, match=r"tokens \[0, 9\).*history="):
        cut.chat("and?", GREEDY)
    assert cut.tokens == before
    assert not any(isinstance(turn, ChatTurn) for turn in cut.turns), "no text from behind the cut is left"
    whole = cut.chat(history=[SYSTEM, user("other")], sampling=GREEDY)
    assert whole.forked_at is None and cut.messages == [SYSTEM, user("other"), whole.message]


def test_an_answer_by_generate_is_an_answer(repo: Repository) -> None:
    """As children that regenerate it do."""
    s = repo.session()
    s.chat("hello", GREEDY)
    s.commit("x", branch="main")
    kids = repo.fork("main:turn=1", 2)
    outs = kids.generate("", WILD)
    for kid, out in zip(kids, outs, strict=True):
        assert kid.messages == [user("hello"), {"role": "assistant", "content": out.text}]
        kid.generate("", WILD)
        assert len(kid.messages) == 2, "an answer that goes on is one"
        assert kid.chat("and?", GREEDY).num_dropped_tokens == 0


def test_plain_text_in_a_conversation_is_kept(repo: Repository) -> None:
    s = repo.session()
    s.chat("hello", GREEDY)
    s.append("[a note]")
    before = s.tokens
    result = s.chat("and?", GREEDY)
    assert result.forked_at is None and s.tokens[: len(before)] == before
    codec = s.engine.codec
    assert list(s.tokens[len(before) : -12]) == codec.encode_chat("</s><s>user\nand?</s><s>assistant\n")
    again = s.tokens
    assert s.chat("more", GREEDY).forked_at is None and s.tokens[: len(again)] == again
    with pytest.raises(InvalidRequest, match=f"not a message, up to token {len(before)}"):
        s.chat(history=[user("hello, again")], sampling=GREEDY)


def test_text_with_a_role_is_no_message(repo: Repository) -> None:
    s = repo.session()
    s.append("You are a pirate.", role="system")
    before = s.tokens
    with pytest.raises(InvalidRequest, match="the system's"):
        s.chat("hello", GREEDY)
    assert s.tokens == before


def test_messages_can_be_appended_without_an_answer(repo: Repository) -> None:
    s = repo.session()
    view = s.append(messages=[SYSTEM, user("a long document")])
    assert list(view.tokens) == s.engine.codec.render_chat(s.messages, add_generation_prompt=False)
    s.commit("read", branch="main")
    kids = repo.fork("main", 2)
    wanted = [rendered(kid, user(text)) for kid, text in zip(kids, ("why?", "how?"), strict=True)]
    results = kids.chat(["why?", "how?"], GREEDY)
    assert [list(kid.tokens[:-12]) for kid in kids] == wanted
    assert [kid.messages[-1] for kid in kids] == [result.message for result in results]
    asked = repo.session()
    asked.append(messages="hello", add_generation_prompt=True)
    answers = asked.fork(2).generate("", WILD)
    assert answers[0].token_ids != answers[1].token_ids
    out = asked.generate("", GREEDY)
    assert asked.messages == [user("hello"), {"role": "assistant", "content": out.text}]
    assert asked.chat("and?", GREEDY).num_dropped_tokens == 0
    with pytest.raises(InvalidRequest, match="alone"):
        s.append("text", messages=[user("x")])
    with pytest.raises(InvalidRequest, match="messages="):
        s.append("text", tools=[TOOL])


def test_a_group_chats_as_one_batch(repo: Repository) -> None:
    s = repo.session(seed=8)
    s.chat([SYSTEM, user("hello")], GREEDY)
    kids = s.fork(3)
    results = kids.chat(user("and?"), WILD)
    assert len({result.completion.token_ids for result in results}) == 3
    assert all(result.forked_at is None for result in results)
    each = kids.chat([[user("a")], [user("b"), user("c")], "d"], [GREEDY, WILD, GREEDY])
    assert [len(kid.messages) for kid in kids] == [7, 8, 7] and [len(r.text) > 0 for r in each] == [True] * 3
    stream = kids.chat_stream("more", GREEDY)
    assert {delta.index for delta in stream} == {0, 1, 2} and len(stream.result()) == 3
    with pytest.raises(InvalidRequest, match="2 messages for 3"):
        kids.chat(["x", "y"], GREEDY)


def test_where_one_of_a_group_cannot_go_on_none_does(repo: Repository) -> None:
    s = repo.session()
    s.chat("hello", GREEDY)
    kids = s.fork(2)
    kids[1].append("secretly", role="user")
    before = [kid.tokens for kid in kids]
    with pytest.raises(InvalidRequest, match="history="):
        kids.chat("and?", GREEDY)
    assert [kid.tokens for kid in kids] == before


def test_the_beginning_of_an_answer_is_continued(repo: Repository) -> None:
    s = repo.session()
    talk = [user("hello"), {"role": "assistant", "content": "Well, "}]
    result = s.chat(talk, GREEDY, continue_final_message=True)
    assert s.text.endswith(f"assistant\nWell, {result.text}") and result.completion.text == result.text
    assert result.message == {"role": "assistant", "content": f"Well, {result.text}"}
    assert s.messages == [user("hello"), result.message]
    s.commit("x", branch="main")
    back = repo.session("main")
    wanted = rendered(back, user("and?"))
    assert back.chat("and?", GREEDY).forked_at is None and list(back.tokens[: len(wanted)]) == wanted
    assert repo.session("main:turn=1").messages == talk
    whole = s.chat(history=[*s.messages, user("and?")], sampling=GREEDY)
    assert whole.forked_at is None and whole.text == back.messages[-1]["content"]
    with pytest.raises(InvalidRequest, match="the user's"):
        s.chat("x", GREEDY, continue_final_message=True)


def test_tools_and_template_variables_hold_until_they_are_given_anew(repo: Repository) -> None:
    s = repo.session()
    s.chat("hello", GREEDY, tools=[TOOL], chat_template_kwargs={"thinking": False})
    s.commit("x", branch="main")
    back = repo.session("main")
    wanted = rendered(back, user("and?"), tools=[TOOL], variables={"thinking": False})
    assert back.chat("and?", GREEDY).forked_at is None and list(back.tokens[: len(wanted)]) == wanted
    settings = [turn.chat.settings for turn in back.turns if isinstance(turn, ChatTurn)]
    assert settings[0] is not None and settings[1] is None, "recorded once"
    other = back.chat("more", GREEDY, chat_template_kwargs={"thinking": True})
    assert other.forked_at is not None and other.num_dropped_sampled == 24
    assert '"thinking": true' in back.text and "weather" in back.text
    assert "weather" not in _text_of_next(back, tools=[])


def _text_of_next(session: Session, **options: Any) -> str:
    session.chat("next", GREEDY, **options)
    return session.text


def test_a_tool_is_a_schema_or_a_function_the_engine_can_read(repo: Repository) -> None:
    def weather(city: str) -> str:
        """Ask.

        Args:
            city: where
        """
        return city

    s = repo.session()
    with pytest.raises(Unsupported, match="weather"):
        s.chat("hello", GREEDY, tools=[weather])
    for tools in ("weather", [3], [{"type": object()}]):
        with pytest.raises(InvalidRequest, match="tools"):
            s.chat("hello", GREEDY, tools=tools)  # type: ignore[arg-type]
    assert s.num_tokens == 0


def test_the_day_on_which_a_conversation_began_stays(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that names today's date costs nothing tomorrow."""
    s = repo.session()
    s.chat("hello", GREEDY, chat_template_kwargs={"clock": True})
    s.commit("x", branch="main")
    _tomorrow(monkeypatch)
    back = repo.session("main")
    assert back.chat("and?", GREEDY).forked_at is None
    assert back.chat(history=[*back.messages, user("more")], sampling=GREEDY).forked_at is None
    fresh = repo.session()
    fresh.chat("hello", GREEDY, chat_template_kwargs={"clock": True})
    assert "2033-01-02" in fresh.text and "2033" not in back.text
    plain = repo.session()
    plain.chat("hello", GREEDY)
    (turn,) = (turn for turn in plain.turns if isinstance(turn, ChatTurn))
    assert turn.chat.settings is not None and turn.chat.settings.moment is None, "no time where none is read"


def _tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    from thaw.repo import chat

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2033, 1, 2, 3, 4, 5)

    monkeypatch.setattr(chat, "datetime", Later)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no messages"),
        (3, "a list of messages was expected"),
        ([None], r"messages\[0\] is a NoneType"),
        (["hello", user("x")], r"messages\[0\] is a str"),
        ([user("x"), {"content": "y"}], r"messages\[1\] has no role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "assistant"}], "no content"),
        ([{"role": "user", "content": 3}], "content is int"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content is dict"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "without 'text'"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "JSON"),
        ([{"role": "user", "content": "x", "n": float("nan")}], "JSON"),
        ([{"role": "user", "content": "\ud800"}], "JSON"),
    ],
)
def test_what_is_no_message_is_refused_by_name_and_changes_nothing(repo: Repository, messages: Any, said: str) -> None:
    s = repo.session()
    s.chat("hello", GREEDY)
    before = s.view()
    with pytest.raises(InvalidRequest, match=said):
        s.chat(messages, GREEDY)
    assert (s.tokens, s.turns) == (before.tokens, before.turns)


def test_either_new_messages_or_the_whole_conversation(repo: Repository) -> None:
    s = repo.session()
    with pytest.raises(InvalidRequest, match="either"):
        s.chat()
    with pytest.raises(InvalidRequest, match="either"):
        s.chat("x", history=[user("y")])
    s.chat("hello", GREEDY)
    with pytest.raises(InvalidRequest, match="begin with the 2"):
        s.chat([*s.messages, user("and?")], GREEDY)


def test_content_is_a_string_or_parts_of_text() -> None:
    parts = [
        "a",
        {"type": "text", "text": "b"},
        {"type": "input_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    assert text_parts(parts, "x") == ["a", "b", "c", "d"]
    assert text_parts("a", "x") == ["a"] and text_parts(None, "x") == []


def test_an_answer_may_call_tools_without_saying_anything(repo: Repository) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    talk: list[dict[str, object]] = [
        user("hello"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    s = repo.session()
    s.chat(talk, GREEDY, tools=[TOOL])
    assert s.messages[:3] == talk and "weather" in s.text and "None" not in s.text
    s.commit("x", branch="main")
    assert repo.session("main").messages == s.messages


def test_an_answer_told_as_tool_calls_is_recorded_so_and_once(repo: Repository) -> None:
    """An agent gives its answers back as calls, not as the text that they were parsed from."""
    s = repo.session(seed=2)
    history: list[dict[str, object]] = [user("hello")]
    s.chat(history=history, sampling=GREEDY)
    for i in range(6):
        called = {"role": "assistant", "content": f"I call {i}.", "tool_calls": [{"function": {"name": f"f{i}"}}]}
        history += [called, {"role": "tool", "content": f"result {i}"}]
        s.chat(history=history, sampling=GREEDY)
        assert s.messages[:-1] == history
    s.commit("x", branch="main")
    back = repo.session("main")
    assert back.messages == s.messages
    kept = [len(turn.chat.messages) for turn in back.turns if isinstance(turn, ChatTurn)]
    assert max(kept) <= 3, "a turn records what is new, not what is long"
    assert back.chat("go on", GREEDY).num_dropped_tokens == 0


def test_a_chat_that_the_engine_refuses_leaves_the_session_as_it_was(repo: Repository) -> None:
    s = repo.session()
    s.chat("one", GREEDY)
    before, ref = s.view(), s.ref
    grammar = Sampling(structured_outputs={"regex": "a+"})  # type: ignore[arg-type]
    with pytest.raises(ThawError):
        s.chat(history=[user("other")], sampling=grammar)
    assert s.ref == ref and (s.tokens, s.turns) == (before.tokens, before.turns)
    with pytest.raises(BadSampling):
        s.chat("x", Sampling(temperature=-1.0))
    with pytest.raises(TooLong, match="as it was"):
        s.chat(history=[user("x" * 100_000)], sampling=GREEDY)
    assert s.ref == ref and (s.tokens, s.turns) == (before.tokens, before.turns)
    assert s.chat("two", GREEDY).forked_at is None


def test_a_child_that_chats_tells_its_own_tokens(repo: Repository) -> None:
    """Of its parent's it may keep fewer, and has them all again where the chat was refused."""
    parent = repo.session()
    parent.chat("one", GREEDY)
    (child,) = parent.fork(1)
    begun = child.num_tokens
    with pytest.raises(ThawError):
        child.chat(history=[user("other")], sampling=Sampling(structured_outputs={"regex": "a+"}))  # type: ignore[arg-type]
    assert child.trajectory().num_inherited_tokens == begun and not any(child.trajectory().own_mask)
    answer = child.chat("two", GREEDY)
    own = child.trajectory()
    assert own.num_inherited_tokens == begun and sum(own.own_mask) == len(answer.completion.token_ids)
    other = child.chat(history=[user("other")], sampling=GREEDY)
    assert other.forked_at is not None and other.forked_at < begun
    own = child.trajectory()
    assert own.num_inherited_tokens == other.forked_at and sum(own.own_mask) == len(other.completion.token_ids)


def test_nothing_is_left_in_the_engine_of_what_a_chat_dropped(repo: Repository) -> None:
    s = repo.session()
    s.chat("one", GREEDY)
    ref = s.ref
    s.chat(history=[user("other")], sampling=GREEDY)
    with pytest.raises(InvalidRequest):
        repo.engine.view(ref)
    stream = s.chat_stream(history=[user("third")], sampling=GREEDY)
    aside = s.ref
    list(stream)
    s.close()
    with pytest.raises(InvalidRequest):
        repo.engine.view(aside)


def test_a_running_session_is_busy(tmp_path: Path, slow_engine: Engine) -> None:
    with thaw.open(tmp_path / "r", engine=slow_engine) as repo:
        s = repo.session()
        with s.chat_stream("go", Sampling(max_tokens=500, ignore_eos=True)) as stream:
            next(iter(stream))
            with pytest.raises(Busy):
                s.chat("too early", GREEDY)
        answer = stream.result(10)
        assert answer.completion.finish_reason == "abort"
        assert s.messages == [user("go"), answer.message]
        assert s.chat("and?", GREEDY).num_dropped_tokens == 0


def test_conversations_of_an_older_thaw_go_on(repo: Repository) -> None:
    """It recorded messages in the meta of the commits of `run --chat`."""
    codec = repo.engine.codec
    s = repo.session()
    for talk in ([SYSTEM, user("hello")], [user("and?")]):
        ids = codec.render_chat(talk, add_generation_prompt=True)
        s.append(token_ids=ids, role="user")
        answer = s.generate("", GREEDY)
        told = [*talk, {"role": "assistant", "content": answer.text}]
        s.append(token_ids=[257], role="assistant")
        s.commit("old", branch="main", meta={"chat.messages": json.dumps(told)})
    back = repo.session("main")
    assert [message["role"] for message in back.messages] == ["system", "user", "assistant", "user", "assistant"]
    result = back.chat("why?", GREEDY)
    assert result.forked_at is None and len(back.messages) == 7
    back.commit("new", branch="main")
    again = repo.session("main")
    assert again.messages == back.messages and again.chat("more", GREEDY).forked_at is None


def test_a_whole_conversation_is_appended_and_answered_later(repo: Repository) -> None:
    """`append(history=…)` is to `chat(history=…)` as `append(messages=…)` is to `chat(…)`."""
    told = [{"role": "user", "content": "What is a blob? " * 8}]
    with repo.session() as session:
        answer = session.chat(told, Sampling(max_tokens=6, seed=1)).message
        longer = [*told, answer, {"role": "user", "content": "And a pack?"}]
        one, two = session.fork(2)
        one.append(history=longer, add_generation_prompt=True)
        said = one.generate(sampling=Sampling(max_tokens=6, seed=2))
        assert said.token_ids == two.chat(history=longer, sampling=Sampling(max_tokens=6, seed=2)).completion.token_ids
        assert one.messages == [*longer, {"role": "assistant", "content": said.text}] == two.messages
        with pytest.raises(InvalidRequest, match="either the new messages, or the whole conversation"):
            one.append(messages=told, history=told)
