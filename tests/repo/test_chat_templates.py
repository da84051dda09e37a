"""Chat by the templates that models come with: of each kind one, shortened to what makes it that kind.

No engine: `Talk` appends what a plan says and the answers that a test gives, as a session does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from thaw.core.canonical import U64
from thaw.core.errors import InvalidRequest, Unsupported
from thaw.core.objects import Turn, with_chat
from thaw.core.sampling import Sampling
from thaw.engines.base import Codec, Message, SessionView
from thaw.engines.hf.pieces import byte_level_alphabet
from thaw.engines.text import cut_turns, text_after
from thaw.repo import chat, conversation, trajectory

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}<|im_start|>tools
{% for t in tools %}{{ t | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% set said = m.content -%}
{%- if m.role == 'assistant' and '</think>' in said and loop.index0 < ns.last -%}
{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ said }}
{%- for c in m.tool_calls or [] %}
<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}"""
"""As Qwen3: thinking stays in answers to the last question, tools stand in front, and thinking can be turned off."""
DATED = (
    "<|im_start|>system\nToday is {{ date_string if date_string is defined else strftime_now('%d %b %Y') }}."
    "<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Llama 3.1, which also trims what is said."""
LAST_USER = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{% if m['role'] == 'user' %}<|im_start|>{{ system ~ '\n\n' if loop.last and system }}{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
"""As Mistral: the system's words stand before the last question, and no header begins an answer."""
KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ part['text'] }}|{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "ask", "parameters": {}}}
Make = Callable[[str], Codec]


class Talk:
    """A session without an engine."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.tokens: list[int] = []
        self.turns: list[Turn] = []

    def view(self) -> SessionView:
        return SessionView(
            tokens=tuple(self.tokens), num_kv=len(self.tokens), turns=tuple(self.turns), seed=0, salt="",
            running=False, parked=False, proof=None,
        )  # fmt: skip

    def plan(self, new: Any = None, **options: Any) -> chat.Plan:
        return chat.plan(self.codec, self.view(), chat.ask(self.codec, new, **options), lambda: None)

    def say(self, new: Any = None, answer: str | Sequence[int] = "", *, end: bool = True, **options: Any) -> chat.Plan:
        """Append what is planned, then the answer: text, or token ids; `end`: with the end token behind it."""
        plan = self.plan(new, **options)
        self.turns = list(cut_turns(self.turns, self.tokens, plan.keep, self.codec))
        self.tokens = self.tokens[: plan.keep]
        if plan.new:
            turn = self._turn("prompt", plan.new, plan.role)
            self.turns[-1] = with_chat(turn, plan.chat)
        ids = list(self.codec.encode_chat(answer) if isinstance(answer, str) else answer)
        self._turn("completion", [*ids, *(self.codec.encode_chat("<|im_end|>") if end else [])], "assistant")
        return plan

    def _turn(self, kind: Any, ids: Sequence[int], role: str) -> Turn:
        start, text = len(self.tokens), text_after(self.codec, self.tokens, ids)
        self.tokens += ids
        sampled = kind == "completion"
        turn = Turn(
            kind=kind, start=start, end=len(self.tokens), role=role, text=text,
            sampling=Sampling() if sampled else None, seed=U64(0) if sampled else None,
            finish_reason="stop" if sampled else None, logprobs=(-0.5,) * len(ids) if sampled else None,
        )  # fmt: skip
        self.turns.append(turn)
        return turn

    @property
    def messages(self) -> list[Message]:
        return conversation.read(self.turns, len(self.tokens)).messages

    def text(self) -> str:
        return self.codec.decode(self.tokens, skip_special_tokens=False)

    def num_sampled(self) -> int:
        return sum(trajectory.of_turns(self.tokens, self.turns).mask)


@pytest.fixture(scope="module")
def make(tiny_model: Callable[..., Path]) -> Make:
    """A codec of a byte-level tokenizer with a template."""
    return lambda template: _codec(tiny_model(), template)


def _codec(folder: Path, template: str) -> Codec:
    transformers = pytest.importorskip("transformers")
    from thaw.engines.hf.codec import HFCodec

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return HFCodec(tokenizer)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("template", [CHATML, THINKING, DATED, KNOWN_ROLES])
def test_an_append_renders_as_the_whole_conversation(make: Make, template: str) -> None:
    talk = Talk(make(template))
    talk.say([{"role": "system", "content": "Be brief."}, user("hello")], "Yes?")
    for text in ("and?", "why?"):
        plan = talk.say(text, "So.")
        assert plan.num_dropped == 0
    variables = {"date_string": datetime.now().strftime("%d %b %Y")}
    whole = talk.codec.render_chat(talk.messages, add_generation_prompt=False, variables=variables)
    assert talk.tokens == whole[: len(talk.tokens)] and len(whole) - len(talk.tokens) == 1, "its last newline"
    assert talk.num_sampled() == 3 + len("Yes?So.So.")


def test_rendering_is_transformers_own(make: Make) -> None:
    transformers = pytest.importorskip("transformers")
    codec: Any = make(THINKING)
    messages = [user("hello"), {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}, user("and?")]
    variables = {"enable_thinking": False}
    theirs = codec._tokenizer.apply_chat_template(
        messages, tools=[TOOL], add_generation_prompt=True, return_dict=False, **variables
    )
    assert codec.render_chat(messages, add_generation_prompt=True, tools=[TOOL], variables=variables) == list(theirs)
    assert transformers.__version__


def test_thinking_that_the_template_drops_is_dropped_and_reported(make: Make) -> None:
    talk = Talk(make(THINKING))
    thought = "<think>\nhm\n</think>\n\nYes?"
    talk.say("hello", thought)
    before = len(talk.tokens)
    plan = talk.say("and?", "So.")
    assert "hm" not in talk.text() and talk.text().count("Yes?") == 1
    assert plan.num_dropped == before - plan.keep == len(thought) + 1 and plan.num_dropped_sampled == plan.num_dropped
    assert [m["content"] for m in talk.messages] == ["hello", thought, "and?", "So."], "the message is kept whole"
    assert talk.say("more", "End.").num_dropped == 0


def test_what_was_sampled_can_be_kept(make: Make) -> None:
    talk = Talk(make(THINKING))
    thought = "<think>\nhm\n</think>\n\nYes?"
    talk.say("hello", thought)
    for text in ("and?", "more"):
        before = list(talk.tokens)
        plan = talk.say(text, thought, keep_sampled=True)
        assert plan.num_dropped == 0 and talk.tokens[: len(before)] == before
        assert talk.codec.decode(plan.new, skip_special_tokens=False) == (
            f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )
    assert talk.num_sampled() == 3 * (len(thought) + 1)
    whole = Talk(talk.codec)
    whole.tokens, whole.turns = list(talk.tokens), list(talk.turns)
    assert whole.plan(history=[*talk.messages, user("x")], keep_sampled=True).num_dropped == 0
    assert talk.plan("x").num_dropped > 0, "each call says whether it keeps"


def test_thinking_can_be_turned_off_and_stays_off(make: Make) -> None:
    talk = Talk(make(THINKING))
    talk.say("hello", "Yes?", chat_template_kwargs={"enable_thinking": False})
    assert talk.text().endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nYes?<|im_end|>")
    plan = talk.say("and?", "So.")
    assert talk.text().endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>")
    assert plan.num_dropped_sampled == len("Yes?") + 1, "the template takes the empty thought out of the first answer"
    kept = Talk(talk.codec)
    kept.say("hello", "Yes?", chat_template_kwargs={"enable_thinking": False})
    assert kept.say("and?", "So.", keep_sampled=True).num_dropped == 0


def test_a_template_with_todays_date_costs_nothing_tomorrow(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(make(DATED))
    talk.say("hello", "Yes?")
    today = datetime.now().strftime("%d %b %Y")
    assert today in talk.text()

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2033, 1, 2)

    monkeypatch.setattr(chat, "datetime", Later)
    assert talk.say("and?", "So.").num_dropped == 0
    assert talk.say(history=[*talk.messages, user("more")]).num_dropped == 0
    pinned = Talk(talk.codec)
    pinned.say("hello", "Yes?", chat_template_kwargs={"date_string": "1 Jan 2000"})
    assert "Today is 1 Jan 2000." in pinned.text()
    moments = {turn.chat.settings.moment for turn in pinned.turns if hasattr(turn, "chat") and turn.chat.settings}
    assert moments == {None}, "no clock was read"


def test_text_that_moves_is_rendered_where_it_now_stands(make: Make) -> None:
    """A template that puts the system's words before the last question has them there, once."""
    talk = Talk(make(LAST_USER))
    talk.say([{"role": "system", "content": "Be brief."}, user("hello")], "Yes?")
    plan = talk.say("and?", "So.")
    assert talk.text() == "<|im_start|>helloYes?<|im_end|><|im_start|>Be brief.\n\nand?So.<|im_end|>"
    assert plan.num_dropped_sampled == 5
    kept = Talk(talk.codec)
    kept.say([{"role": "system", "content": "Be brief."}, user("hello")], "Yes?")
    kept.say("and?", "So.", keep_sampled=True)
    assert kept.text() == ("<|im_start|>Be brief.\n\nhelloYes?<|im_end|><|im_start|>Be brief.\n\nand?So.<|im_end|>")


def test_a_message_that_the_template_leaves_out_is_an_error(make: Make) -> None:
    talk = Talk(make(KNOWN_ROLES))
    talk.say("hello", "Yes?")
    with pytest.raises(InvalidRequest, match=r"text of message 2 \(role 'developer'\)"):
        talk.plan([{"role": "developer", "content": "Be brief."}, user("and?")])
    call = {"function": {"name": "weather", "arguments": "{}"}}
    with pytest.raises(InvalidRequest, match="tool calls of message 2"):
        talk.plan([{"role": "assistant", "content": "I ask.", "tool_calls": [call]}, user("and?")])
    with pytest.raises(Unsupported, match="no place for tools; 'weather'"):
        talk.plan("and?", tools=[TOOL])


def test_what_the_template_refuses_is_refused_in_its_words(make: Make) -> None:
    talk = Talk(make(LAST_USER))
    with pytest.raises(InvalidRequest, match="Only user and assistant roles are supported"):
        talk.plan([user("hello"), {"role": "tool", "content": "sunny"}])
    for broken in ("{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ messages.nothing() }}", "{% if %}"):
        with pytest.raises(InvalidRequest, match="chat template refuses"):
            Talk(make(broken)).plan("hello")
    codec: Any = make(CHATML)
    codec._tokenizer.chat_template = None
    with pytest.raises(Unsupported, match="no chat template"):
        Talk(codec).plan("hello")
    for wrong in (5, True, {"default": 5}):
        codec._tokenizer.chat_template = wrong
        with pytest.raises(Unsupported, match=r"chat template is a (int|bool), and only text"):
            Talk(codec).plan("hello")
    with pytest.raises(InvalidRequest, match="'tokenize' is no variable"):
        Talk(make(CHATML)).plan("hello", chat_template_kwargs={"tokenize": True})


@pytest.mark.parametrize("content", ["one", ["one"], [{"type": "text", "text": "one"}]])
def test_content_is_in_the_shape_that_the_template_reads(make: Make, content: Any) -> None:
    for template, said in ((PARTS, "one|"), (CHATML, "one"), (THINKING, "one"), (DATED, "one")):
        talk = Talk(make(template))
        talk.say([{"role": "user", "content": content}], "Yes?")
        assert f"<|im_start|>user\n{said}<|im_end|>" in talk.text()
        assert talk.messages[0] == {"role": "user", "content": content}
        assert talk.plan("and?").num_dropped == (template is PARTS), "the end token, where a template adds to an answer"


def test_several_parts_are_joined_by_newlines_or_given_as_they_are(make: Make) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for template, said in ((PARTS, "one|two|"), (CHATML, "one\ntwo")):
        talk = Talk(make(template))
        talk.say([{"role": "user", "content": parts}], "Yes?")
        assert f"<|im_start|>user\n{said}<|im_end|>" in talk.text()
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        with pytest.raises(Unsupported, match="message 2: a part of type 'image_url'"):
            talk.plan([{"role": "user", "content": [*parts, image]}])


def test_arguments_of_tool_calls_are_objects_to_the_template(make: Make) -> None:
    """Clients send them as JSON text, which would be quoted a second time."""
    talk = Talk(make(THINKING))
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    history = [
        user("hello"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
    ]
    talk.say(history=history, answer="Sunny.", tools=[TOOL])
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in talk.text()
    assert talk.messages[:3] == history and "None" not in talk.text()
    broken = {**call, "function": {"name": "weather", "arguments": "{city"}}
    talk.say([{"role": "assistant", "tool_calls": [broken]}, {"role": "tool", "content": "x"}], "Yes.")
    assert '"arguments": "{city"' in talk.text()


def test_tools_may_be_documented_functions(make: Make) -> None:
    def weather(city: str) -> str:
        """Say the weather.

        Args:
            city: the city's name
        """
        return city

    def undocumented(city: str) -> str:
        return city

    talk = Talk(make(THINKING))
    talk.say("hello", "Yes?", tools=[weather])
    assert "the city's name" in talk.text()
    with pytest.raises(InvalidRequest, match="undocumented cannot be offered as a tool"):
        talk.plan("hello", tools=[undocumented])


def test_an_answer_is_continued_from_its_beginning(make: Make) -> None:
    for template in (CHATML, THINKING, DATED):
        talk = Talk(make(template))
        talk.say([user("hello"), {"role": "assistant", "content": "Well, "}], "yes.", continue_final_message=True)
        assert talk.text().endswith("<|im_start|>assistant\nWell, yes.<|im_end|>")
        assert talk.messages[1] == {"role": "assistant", "content": "Well, yes."}
        assert talk.say("and?", "So.").num_dropped == 0
        parts = [{"type": "text", "text": "Well, "}]
        plan = talk.say([user("x"), {"role": "assistant", "content": parts}], "no.", continue_final_message=True)
        assert plan.num_dropped == 0 and talk.text().endswith("assistant\nWell, no.<|im_end|>")
        assert talk.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": "Well, no."}]}


def test_an_answer_without_an_end_is_ended_by_the_template(make: Make) -> None:
    talk = Talk(make(CHATML))
    talk.say("hello", "cut at its leng", end=False)
    assert talk.say("and?", "So.").num_dropped == 0
    assert "cut at its leng<|im_end|>\n<|im_start|>user" in talk.text()


def test_white_space_that_the_template_trims_costs_no_more_than_itself(make: Make) -> None:
    talk = Talk(make(DATED))
    talk.say("hello", "Yes, of course.  \n")
    plan = talk.say("and?", "So.")
    assert plan.num_dropped_sampled == len("  \n") + 1
    assert "Yes, of course.<|im_end|>\n<|im_start|>user" in talk.text()


def test_tokens_that_the_tokenizer_would_not_have_chosen_stay(demo_model: Path) -> None:
    """Where only the tokenisation differs, the sampled ids win: of the whole answer, or any part of it."""
    codec = _codec(demo_model, CHATML)
    pieces = ["un", "believ", "able", ", Grü", "ße", " an", " al", "le", " ", " ", "x", "\n", "東", "京", " 12", "3"]
    odd = [token for piece in pieces for token in codec.encode(piece, first=False)]
    text = codec.decode(odd)
    assert codec.encode_chat(text) != odd
    talk = Talk(codec)
    for end in (True, False):
        before = talk.num_sampled()
        assert talk.say("hello", odd, end=end).num_dropped == 0
        plan = talk.say("and?", "So.")
        assert (
            plan.num_dropped == 0 and talk.num_sampled() == before + len(odd) + end + len(codec.encode_chat("So.")) + 1
        )
        whole = talk.plan(history=[*talk.messages, user("x")])
        assert (whole.num_dropped, whole.new) == (0, talk.plan("x").new)
    changed = [*talk.messages[:1], {"role": "assistant", "content": f"{text}!"}, user("x")]
    plan = talk.plan(history=changed)
    first = talk.turns[1]
    assert plan.keep >= first.end - 2, "as much of the answer as is the same stays"
    assert codec.decode([*talk.tokens[: plan.keep], *plan.new], skip_special_tokens=False).count(f"{text}!") == 1


def test_end_tokens_and_stop_strings_follow_the_template(demo_model: Path) -> None:
    codec = _codec(demo_model, CHATML)
    talk = Talk(codec)
    ids = codec.encode("Yes.", first=False)
    talk.say("hello", [*ids, 0], end=False)
    assert codec.decode([0]) == ""
    plan = talk.say("and?", "So.")
    assert plan.num_dropped == plan.num_dropped_sampled == 1, "another end than the template's"
    stopped = Talk(codec)
    stopped.say("hello", codec.encode("Yes.\nHuman:", first=False), end=False)
    stopped.turns[-1] = _with_text(stopped.turns[-1], "Yes.")
    stopped.say("and?", "So.")
    assert "Human:" not in stopped.text() and "Yes.<|im_end|>\n<|im_start|>user" in stopped.text()


def _with_text(turn: Turn, text: str) -> Turn:
    import msgspec

    return msgspec.structs.replace(turn, text=text)


def test_an_answer_that_ends_inside_a_character_keeps_its_tokens(make: Make) -> None:
    """The text of the answer has no part of a character; its tokens have."""
    talk = Talk(make(CHATML))
    half = talk.codec.encode_chat("Yes \U0001f44f")[:-2]
    talk.say("hello", half, end=False)
    assert talk.messages[-1] == {"role": "assistant", "content": "Yes "}
    assert talk.say("and?", "So.").num_dropped == 0
    assert talk.say(history=[*talk.messages, user("more")]).num_dropped == 0
    assert talk.num_sampled() == len(half) + 4 + 1


@pytest.mark.parametrize("tail", ["ef", "efbf", "ef78", "f09f", "80", "efbfbd", "efbfbdefbf", "ff", "c328", "efefbf"])
def test_an_answer_that_is_no_utf8_keeps_its_tokens(make: Make, tail: str) -> None:
    """Its text has U+FFFD where its tokens have bytes, some of which are the first bytes of U+FFFD."""
    talk = Talk(make(CHATML))
    backend = talk.codec._backend  # type: ignore[attr-defined]
    symbols = {byte: symbol for symbol, byte in byte_level_alphabet().items()}
    ids = [backend.token_to_id(symbols[byte]) for byte in b"Yes " + bytes.fromhex(tail)]
    for end in (True, False):
        talk.say("hello", ids, end=end)
        for more in (
            {"new": "and?"},
            {"history": [*talk.messages, user("and?")]},
            {"new": "and?", "keep_sampled": True},
        ):
            plan = talk.plan(**more)
            said = talk.codec.decode(plan.new, skip_special_tokens=False)
            assert plan.num_dropped == 0 and said.removeprefix("<|im_end|>").startswith("\n<|im_start|>user\nand?")
