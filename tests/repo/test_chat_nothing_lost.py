"""Nothing that messages say is lost, whatever they say and whatever the template does with it. No engine: `Talk`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat_templates import CHATML, KNOWN_ROLES, THINKING, TOOL, Make, Talk, _codec, user

from thaw.core.errors import InvalidRequest, Unsupported
from thaw.engines.base import Codec
from thaw.repo.chat import END, HERE
from thaw.repo.marks import Marks

FIRST, NEXT = Marks(), Marks(Marks().of(0))
FRAGMENTS = (
    *(marks.of(number) for marks in (FIRST, NEXT) for number in (0, HERE, END)),
    "9000000", "9", "0", "thawMarkHereq", "thawMarkEndq", "thawMark0q", "a", " ",
)  # fmt: skip
"""Marks as they are chosen first, the next, their beginnings, and those that once were words."""
WORDS = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=12).map("".join).filter(str.strip)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% if HOW %}{{ HOW }}{% endif %}</call>{% endfor %}"
)

trl = importlib.util.find_spec("trl")
TEMPLATES = Path(trl.origin or "").parent / "chat_templates" if trl is not None else Path("none")
MODELS = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if "training" not in path.stem)


def template(said: str, *, calls: str = "") -> str:
    """A template that says each message as `said` does, and calls of tools as `calls` does."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        + said
        + (CALLS.replace("HOW", calls) if calls else "")
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def calling(arguments: Any, name: str = "weather") -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "I look.", "tool_calls": [call]}


@pytest.fixture(scope="module")
def make(tiny_model: Callable[..., Path]) -> Make:
    return lambda text: _codec(tiny_model(), text)


@pytest.fixture(scope="module")
def chatml(make: Make) -> Codec:
    return make(CHATML)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=WORDS, answer=WORDS, note=WORDS, then=WORDS, begun=WORDS)
def test_messages_may_say_anything_and_keep_their_headers(
    chatml: Codec, first: str, answer: str, note: str, then: str, begun: str
) -> None:
    """Behind answers that are kept, behind plain text, and where an answer is begun."""
    talk = Talk(chatml)
    talk.say([{"role": "system", "content": then}, user(first)], answer)
    said = f"<|im_start|>system\n{then}<|im_end|>\n<|im_start|>user\n{first}{ANSWER}{answer}"
    assert talk.text() == f"{said}<|im_end|>"
    talk.say(then, answer, keep_sampled=True)
    said = f"{said}<|im_end|>\n<|im_start|>user\n{then}{ANSWER}{answer}"
    assert talk.text() == f"{said}<|im_end|>"
    talk._turn("prompt", chatml.encode(note, first=False), None)
    talk.say(then, answer)
    said = f"{said}<|im_end|>{note}<|im_end|>\n<|im_start|>user\n{then}{ANSWER}{answer}"
    assert talk.text() == f"{said}<|im_end|>"
    talk.say([user(first), {"role": "assistant", "content": begun}], answer, continue_final_message=True)
    assert talk.text() == f"{said}<|im_end|>\n<|im_start|>user\n{first}{ANSWER}{begun}{answer}<|im_end|>"


@given(texts=st.lists(WORDS, max_size=4), numbers=st.lists(st.integers(0, 8**8 - 1), max_size=5), around=WORDS)
def test_a_mark_is_found_where_it_was_put_and_nowhere_else(texts: list[str], numbers: list[int], around: str) -> None:
    marks = Marks(*texts, around)
    assert marks.found("".join(texts)) == set()
    assert marks.found(around + "".join(marks.of(number) for number in numbers) + around) == set(numbers)
    assert (around + marks.of(0) + around).split(marks.of(0)) == [around, around]
    assert int(float(int(marks.of(8**8 - 1)))) == int(marks.of(8**8 - 1))


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("{{ m.content[0].text }}", 1),
        ("{% for p in m.content %}{% if loop.last %}{{ p.text }}{% endif %}{% endfor %}", 0),
    ],
)
def test_a_part_that_the_template_drops_is_an_error(make: Make, said: str, lost: int) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    talk = Talk(make(template("{% if m.content is string %}{{ m.content }}{% else %}" + said + "{% endif %}")))
    talk.say("hello", "Yes.")
    with pytest.raises(InvalidRequest, match=f"leaves out the part {lost} of message 2"):
        talk.plan([{"role": "user", "content": parts}])


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("how", "arguments", "lost"),
    [
        ("''", {"city": "Rome"}, "argument 'city'"),
        ("''", {"n": 5}, "argument 'n'"),
        ("''", {"sure": True}, "argument 'sure'"),
        ("c.function.arguments.city", {"city": "Rome", "day": "Monday"}, "argument 'day'|argument 'city'"),
        ("c.function.arguments.keys() | join(',')", {"city": {"name": "Rome"}}, "argument 'name'"),
        ("c.function.arguments | tojson", {"city": "Rome", "at": [1, 2.5, {"x": None}], "": ""}, None),
        ("c.function.arguments | tojson", {}, None),
    ],
)
def test_an_argument_that_the_template_drops_is_an_error(
    make: Make, how: str, arguments: dict[str, Any], lost: str | None, as_text: bool
) -> None:
    talk = Talk(make(template("{{ m.content }}", calls=how)))
    given = calling(json.dumps(arguments) if as_text else arguments)
    messages = [user("hello"), given, {"role": "tool", "content": "sunny"}]
    if lost is None:
        talk.say(messages)
        assert json.dumps(arguments) in talk.text()
    else:
        with pytest.raises(InvalidRequest, match=rf"leaves out the ({lost}) of tool calls of message 1"):
            talk.plan(messages)


def test_what_says_something_elsewhere_in_a_message_is_not_lost(make: Make) -> None:
    talk = Talk(make(THINKING))
    for field in ({"refusal": "I cannot."}, {"function_call": {"name": "weather", "arguments": "{}"}}):
        with pytest.raises(InvalidRequest, match=r"leaves out the (refusal|tool calls) of message 1"):
            talk.plan([user("hello"), {"role": "assistant", "content": "No.", **field}, user("so?")])
    quiet = {"refusal": None, "function_call": None, "tool_calls": None, "audio": None, "reasoning_content": "hm"}
    talk.say([user("hello"), {"role": "assistant", "content": "No.", **quiet}, user("so?")])


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("{{ m.content.split('!')[1] if m.role == 'user' else m.content }}", None),
        ("{{ m.content if m.content.endswith('!x') or m.role != 'user' else raise_exception('no') }}", None),
        ("{{ m.content if m.content in ('hello!x', 'more!x') else raise_exception('no') }}", None),
        ("{% if m.content not in ('hello!x', 'more!x') %}{{ raise_exception('no') }}{% endif %}hello!x", 2),
        ("{{ m.content.split('!')[1] if loop.index0 != 1 else '' }}", 1),
    ],
)
def test_a_template_that_reads_the_words_is_asked_all_the_same(make: Make, said: str, lost: int | None) -> None:
    """It refuses marks in their place: with the words beside the mark, or by the words, it can be told."""
    talk = Talk(make(template(said)))
    messages = [user("hello!x"), {"role": "assistant", "content": "hello!x"}, user("more!x")]
    if lost is None:
        talk.say(messages)
    else:
        with pytest.raises(InvalidRequest, match=f"leaves out the text of message {lost}"):
            talk.plan(messages)


def test_many_messages_that_refuse_marks_are_asked_about_in_halves(make: Make) -> None:
    text = template("{{ m.content.split('!')[1] if m.content.startswith('!') else m.content }}")
    talk = Talk(make(text.replace("{{", "{% if m.content == '1' * 15 %}{{ raise_exception('no') }}{% endif %}{{", 1)))
    talk.say([user(f"!{i}") for i in range(200)])
    assert talk.text().count("<|im_start|>user") == 200


def test_a_template_that_capitalises_says_everything(make: Make) -> None:
    for how in ("upper", "lower", "title", "trim"):
        text = THINKING.replace("{{ said }}", f"{{{{ said | {how} }}}}")
        text = text.replace("c.function.name }}", f"c.function.name | {how} }}}}")
        talk = Talk(make(text.replace("{{ t | tojson }}", f"{{{{ t.function.name | {how} }}}}")))
        call = calling({"city": "Rome"})
        talk.say([user("what"), call, {"role": "tool", "content": "sun"}], "Yes.", tools=[TOOL])
        assert "ROME" not in talk.text() and getattr("what", how.replace("trim", "strip"))() in talk.text()


def test_a_tool_that_is_called_like_another_word_is_missed(make: Make) -> None:
    """Its name stands in the conversation anyhow."""
    tool = {"type": "function", "function": {"name": "user", "parameters": {}}}
    with pytest.raises(Unsupported, match="no place for tools; 'user'"):
        Talk(make(KNOWN_ROLES)).plan("the user", tools=[tool])


def test_where_the_template_says_a_text_twice_what_follows_it_is_not_guessed(make: Make) -> None:
    talk = Talk(make(template("{{ m.content }}|{{ m.content }}")))
    talk.say("hello", "a")
    before = list(talk.tokens)
    with pytest.raises(InvalidRequest, match="says the text of message 1 2 times"):
        talk.plan("and?", keep_sampled=True)
    with pytest.raises(InvalidRequest, match="says the text of message 3 2 times"):
        talk.plan([user("x"), {"role": "assistant", "content": "Well"}], continue_final_message=True)
    assert talk.tokens == before and talk.plan("and?").num_dropped > 0


@pytest.mark.parametrize("name", MODELS)
def test_templates_of_models_say_all_or_are_refused(make: Make, name: str) -> None:
    """Those that TRL ships: what is sampled stays, what follows is there once, and nothing else is said anew."""
    tool = {**TOOL, "function": {**TOOL["function"], "description": "ask"}}
    result = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "sunny there"}
    talk = Talk(make((TEMPLATES / f"{name}.jinja").read_text()))
    call = calling({"city": "Rome"})
    try:
        talk.say("hello", "I look. So I call.", tools=[tool])
        for keep in (False, True):
            fresh = Talk(talk.codec)
            fresh.tokens, fresh.turns = list(talk.tokens), list(talk.turns)
            plan = fresh.plan(history=[user("hello"), call, result], keep_sampled=keep)
            new = talk.codec.decode(plan.new, skip_special_tokens=False)
            assert new.count("sunny there") == 1 and new.count("Rome") == (not keep)
            assert (plan.num_dropped == 0) or not keep
    except Unsupported as refused:
        assert "no place for tools" in str(refused)
    except InvalidRequest as refused:
        assert any(
            why in str(refused) for why in ("leaves out the t", "does not tell what", "refuses this conversation")
        )


def test_calls_that_were_sampled_are_not_said_again_where_they_are_kept(make: Make) -> None:
    """An agent gives an answer back as the calls that were read from it."""
    talk = Talk(make(THINKING))
    sampled = 'I look.\n<tool_call>{"name":"weather","arguments":{}}</tool_call>'
    talk.say("hello", sampled, tools=[TOOL])
    history = [user("hello"), calling({}), {"role": "tool", "content": "sunny"}]
    plan = talk.say(history=history, answer="Sunny.", keep_sampled=True)
    assert plan.num_dropped == 0 and talk.text().count("<tool_call>") == 1
    assert talk.text().endswith(f"{sampled}<|im_end|>\n<|im_start|>tool\nsunny{ANSWER}Sunny.<|im_end|>")
    assert talk.messages[:3] == history
    with pytest.raises(InvalidRequest, match="the last message calls tools"):
        talk.plan([user("x"), calling({})], continue_final_message=True)


def test_results_that_are_said_along_with_the_calls_are_not_lost(make: Make) -> None:
    """As Gemma 4 says them; and a template that takes no result without the calls."""
    along = template("{{ m.content }}", calls="''").replace(
        "<|im_end|>", "{% if m.tool_calls %}{{ messages[loop.index].content }}{% endif %}<|im_end|>"
    )
    along = along.replace("messages %}", "messages %}{% if m.role != 'tool' %}", 1)
    along = along.replace("{% endfor %}{% if add", "{% endif %}{% endfor %}{% if add")
    needs = template("{{ m.content if m.role != 'tool' or messages[1].tool_calls else 1 / 0 }}", calls="''")
    for text, why in ((along, "text of a later one"), (needs, "")):
        talk = Talk(make(text))
        talk.say("hello", "I look.<call>weather</call>")
        history = [user("hello"), calling({}), {"role": "tool", "content": "sunny"}]
        with pytest.raises(InvalidRequest, match=f"does not tell what stands behind it.*{why}.*keep_sampled"):
            talk.plan(history=history, keep_sampled=True)
        talk.say(history=history)
        assert "sunny" in talk.text()


def test_arguments_are_text_to_a_template_that_writes_them_down(make: Make) -> None:
    """As DeepSeek's does; and one that would print an object as Python does."""
    for how in ("'json\n' + c.function.arguments", "c.function.arguments", "'' ~ c.function.arguments"):
        for arguments in ({"city": "Köln"}, '{"city": "Köln"}'):
            talk = Talk(make(template("{{ m.content }}", calls=how)))
            talk.say([user("hello"), calling(arguments), {"role": "tool", "content": "sunny"}])
            assert '{"city": "Köln"}</call>' in talk.text()
    pythonic = "c.function.arguments.items() | map('join', '=') | join(', ')"
    talk = Talk(make(template("{{ m.content }}", calls=pythonic)))
    talk.say([user("hello"), calling('{"city": "Köln"}'), {"role": "tool", "content": "sunny"}])
    assert "<call>weathercity=Köln</call>" in talk.text()


def test_arguments_of_any_depth_are_an_answer_or_an_error(make: Make) -> None:
    talk = Talk(make(THINKING))
    for depth in (60, 70, 100_000):
        nested = "[" * depth + "]" * depth
        for arguments in (nested, f'{{"a": {nested}}}'):
            talk.plan([user("x"), calling(arguments), {"role": "tool", "content": "y"}])


def test_names_that_are_the_templates_own_are_no_variables(make: Make) -> None:
    with pytest.raises(InvalidRequest, match="'self' is no variable"):
        Talk(make(CHATML)).plan("hello", chat_template_kwargs={"self": 1})
    talk = Talk(make("{{ documents[0].text if documents }}" + CHATML))
    talk.say("hello", chat_template_kwargs={"documents": [{"text": "A document."}]})
    assert talk.text().startswith("A document.<|im_start|>")


@pytest.mark.parametrize("extra", [{1: 2}, [{"a": {None: 1}}], {True: 0}])
def test_keys_that_json_would_turn_into_text_are_refused(make: Make, extra: Any) -> None:
    talk = Talk(make(CHATML))
    for options in (
        {"new": {"role": "user", "content": "x", "extra": extra}},
        {"new": "x", "tools": [{**TOOL, "extra": extra}]},
        {"new": "x", "chat_template_kwargs": {"extra": extra}},
    ):
        with pytest.raises(InvalidRequest, match=r"the key .* and only text can be one"):
            talk.plan(**options)


def test_messages_of_the_session_that_a_history_leaves_out_are_counted(make: Make) -> None:
    talk = Talk(make(CHATML))
    talk.say([{"role": "system", "content": "Be brief."}, user("one")], "Yes.")
    talk.say("two", "No.")
    held = talk.messages
    assert len(held) == 5
    for history, count in (
        ([*held, user("three")], 0),
        (held[:4], 1),
        ([held[0], user("other")], 4),
        ([{"role": "system", "content": "Be long."}, *held[1:], user("three")], 5),
        ([*held[:2], {"role": "assistant", "content": "Yes!"}, *held[3:], user("three")], 3),
    ):
        plan = talk.plan(history=history)
        assert plan.num_dropped_messages == count and (plan.num_dropped > 0) == (count > 0)
    assert talk.plan("three").num_dropped_messages == 0
    thinking = Talk(make(THINKING))
    thinking.say("hello", "<think>\nhm\n</think>\n\nYes?")
    plan = thinking.plan("and?")
    assert plan.num_dropped > 0 and plan.num_dropped_messages == 0, "the message is there, the template drops of it"
