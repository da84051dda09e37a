"""Hugging Face tokenizers as codecs: pieces that are appended, tokens that frame a text, and the same from files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from made_tokenizers import byte_level, sentencepiece  # noqa: E402

from thaw.core.cache import FullKV  # noqa: E402
from thaw.core.errors import IncompleteModel, NotFound  # noqa: E402
from thaw.core.identity import ModelIdentity  # noqa: E402
from thaw.core.sampling import Sampling  # noqa: E402
from thaw.engines.hf.codec import HFCodec  # noqa: E402
from thaw.engines.hf.config import stop_set  # noqa: E402
from thaw.engines.hf.tokenizer import FileTokenizer, load_tokenizer  # noqa: E402
from thaw.engines.served.client.remembered import CACHE_NAME, remembered  # noqa: E402
from thaw.engines.session.text import TextStream  # noqa: E402
from thaw.engines.session.turns import OpenTurn, _unseen_stops  # noqa: E402
from thaw.engines.sglang.client.engine import SglangDialect  # noqa: E402

PIECES = [
    ["un", "believable", "."],
    ["The answer is", "\nNext line", " and", "  two spaces", "☃"],
    ["a", " ", "b"],
    ["call [X]", " more", "<s>", "x"],
]
MAKERS: dict[str, Callable[[], Any]] = {
    "first": lambda: sentencepiece("first"),
    "always": lambda: sentencepiece("always"),
    "normalizer": lambda: sentencepiece("normalizer"),
    "with merges": lambda: sentencepiece("normalizer", merges=["▁un", "believ", "▁The", "ine"]),
    "byte-level": byte_level,
    "byte-level with a space before a text": lambda: byte_level(add_prefix_space=True),
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("maker", MAKERS)
def test_pieces_join_without_a_space_between_them(maker: str, pieces: list[str]) -> None:
    codec = HFCodec(MAKERS[maker]())
    tokens: list[int] = []
    for piece in pieces:
        tokens += codec.encode(piece, first=not tokens)
    said = codec.decode(tokens, skip_special_tokens=False).removeprefix("<s>")
    assert said.removeprefix(" ") == "".join(pieces), "a text itself may begin with the tokenizer's space"


@pytest.mark.parametrize("maker", MAKERS)
def test_a_conversation_has_the_same_tokens_in_pieces_and_whole(maker: str) -> None:
    """Also where the tokenizer puts a space behind a special token; a piece that begins as text gets none before it."""
    tokenizer = MAKERS[maker]()
    codec, end = HFCodec(tokenizer), tokenizer.eos_token
    pieces = [
        "[INST] un believable [/INST]",
        f"able{end}[INST] and [/INST]",
        f"{end}{end}[INST]",
        "so, ",
        f"x{end} y{end}",
    ]
    tokens: list[int] = []
    for piece in pieces:
        tokens += codec.encode_chat(piece, inside=bool(tokens))
    assert tokens == codec.encode_chat("".join(pieces))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_text_begins_as_the_tokenizer_begins_it(maker: str) -> None:
    tokenizer = MAKERS[maker]()
    assert HFCodec(tokenizer).encode("Once upon", first=True) == tokenizer.encode("Once upon")


@pytest.mark.parametrize("around", ["<s> $A </s>", "$A </s>", "<s> $A", "$A"])
def test_no_end_token_stands_after_the_first_piece(around: str) -> None:
    codec = HFCodec(sentencepiece(around=around))
    tokens = codec.encode("A document", first=True)
    assert (tokens[0] == 1) == around.startswith("<s>") and 2 not in tokens
    assert codec.decode(tokens) == "A document"
    assert codec.encode("", first=True) == ([1] if around.startswith("<s>") else [])


def test_a_tokenizer_written_in_python() -> None:
    """It has no backend of the tokenizers library; ByT5's ends every text, and leaves out what is no UTF-8."""
    codec = HFCodec(transformers.ByT5Tokenizer())
    tokens = codec.encode("Grüße ☃", first=True)
    assert codec.decode(tokens) == "Grüße ☃" and len(tokens) == len("Grüße ☃".encode())
    assert codec.decode([*tokens, *codec.encode(" und mehr", first=False)]) == "Grüße ☃ und mehr"


def test_special_tokens_that_say_something_stand_in_the_text() -> None:
    codec = HFCodec(byte_level(specials=["[TOOL_CALLS]"]), ends=(256,))
    call, start, end, text_end = (
        codec.encode(t, first=False)[0] for t in ("[TOOL_CALLS]", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    )
    tokens = [start, *codec.encode("so: ", first=False), call, *codec.encode("[]", first=False), end, text_end]
    assert text_end == 256
    assert codec.decode(tokens) == "<|im_start|>so: [TOOL_CALLS][]"
    assert codec.decode(tokens, skip_special_tokens=False) == "<|im_start|>so: [TOOL_CALLS][]<|im_end|><|endoftext|>"


def taken(codec: HFCodec, sampling: Sampling, text: str, ends: tuple[int, ...]) -> tuple[str, Any, Any]:
    """(text, finish_reason, stop_reason) of a turn that says `text`."""
    turn = OpenTurn(
        start=0, sampling=sampling, seed=0, policy="0", role=None, stream=TextStream(codec, [], sampling.stop),
        unseen_stops=_unseen_stops(codec, sampling),
    )  # fmt: skip
    for token in codec.encode(text, first=False):
        reason, stop = turn.take(token, 0.0, (), None, eos=ends, full=False)
        if reason:
            return turn.stream.text, reason, stop
    return turn.stream.text, None, None


def test_stop_strings_match_special_tokens_seen_or_not() -> None:
    tokenizer = byte_level(specials=["[TOOL_CALLS]"])
    ends = stop_set((), tokenizer, 1000)
    codec = HFCodec(tokenizer, ends)
    said = "so [TOOL_CALLS]x<|im_end|>y"
    many = Sampling(max_tokens=99, ignore_eos=True, stop=("[TOOL_CALLS]", "<|im_end|>"))
    assert taken(codec, many, said, ends) == ("so ", "stop", "[TOOL_CALLS]")
    unseen = Sampling(max_tokens=99, ignore_eos=True, stop=("<|im_end|>",))
    assert taken(codec, unseen, said, ends) == ("so [TOOL_CALLS]x", "stop", "<|im_end|>")
    held = Sampling(max_tokens=99, ignore_eos=True, stop=("<|im_end|>",), min_tokens=40)
    assert taken(codec, held, said, ends) == ("so [TOOL_CALLS]xy", None, None)
    assert taken(codec, Sampling(max_tokens=99), said, ends) == ("so [TOOL_CALLS]x", "stop", None)


def test_the_tokenizers_end_token_is_one_of_the_ends() -> None:
    tokenizer = byte_level()
    assert stop_set((256, 7, 256), tokenizer, 1000) == (256, 7, 258)
    assert stop_set((258,), tokenizer, 1000) == (258,)
    assert stop_set((256, 5000), tokenizer, 258) == (256,), "what the model cannot say ends nothing"
    assert stop_set((1,), object(), 10) == (1,)


def test_sglang_goes_on_where_only_it_would_end() -> None:
    """It takes the config's end of text for one even where generation_config.json names another; there it is told to
    ignore all, and the client ends the turn."""
    codec = HFCodec(byte_level(), (258,))
    asked = OpenTurn(
        start=0, sampling=Sampling(), seed=0, policy="0", role=None, stream=TextStream(codec, [], ()),
    )  # fmt: skip
    for more, eom, ignores in [((), (), False), ((256,), (), True), ((258,), (), False), ((), ("<|eom_id|>",), True)]:
        said = HFCodec(byte_level(specials=eom), (258,))
        info = SimpleNamespace(eos_token_ids=(258,), max_model_len=99)
        fields = SglangDialect(SimpleNamespace(more_ends=more), info, said).fields(asked, 5)  # type: ignore[arg-type]
        assert (fields["ignore_eos"], fields["stop_token_ids"]) == (ignores, [258])


# --- from files alone

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi  ☃"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "un"}],
]
TEMPLATE = """{%- for m in messages %}
{{- bos_token if loop.first }}[{{ m['role'] }}]
{%- if m.tool_calls is defined %}{% for call in m.tool_calls %}{{ call | tojson(indent=2) }}{% endfor %}{% endif %}
{%- if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}
{% generation %}{{ m.content }}{% endgeneration %}
{%- if loop.index > 5 %}{% break %}{% endif %}
{%- endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{{ strftime_now("%Y") }}{{ more }}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
RICH: list[dict[str, Any]] = [
    {"role": "user", "content": "<&>é"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "é", "arguments": {"a": 1}}}]},
    {"role": "assistant", "content": "fine", "thinking": "why", "tool_calls": None},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def folder_of(tokenizer: Any, folder: Path, **config: Any) -> Path:
    """A model's folder as far as its tokenizer goes; `config` goes into tokenizer_config.json."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | config))
    return folder


def same(folder: Path) -> FileTokenizer:
    """Assert that the files say what transformers makes of them."""
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, FileTokenizer)
    one, two = HFCodec(ours), HFCodec(theirs)
    assert one.identity() == two.identity()
    assert one._left_out == two._left_out and ours.eos_token_id == theirs.eos_token_id
    for text in ("Hello world", " x", "un", "a<s>b [TOOL_CALLS] c<|im_end|>", "多い ☃👏", ""):
        for first in (True, False):
            assert one.encode(text, first=first) == two.encode(text, first=first)
            assert one.decode(one.encode(text, first=first)) == two.decode(two.encode(text, first=first))
    if theirs.chat_template:
        for chat in CHATS:
            for prompted in (True, False):
                ids = one.render_chat(chat, add_generation_prompt=prompted)
                assert ids == two.render_chat(chat, add_generation_prompt=prompted)
                text = theirs.apply_chat_template(chat, add_generation_prompt=prompted, tokenize=False)
                assert ids == theirs.encode(text, add_special_tokens=False)
    return ours


@pytest.mark.parametrize("maker", MAKERS)
def test_files_alone_say_the_same(maker: str, tmp_path: Path) -> None:
    same(folder_of(MAKERS[maker](), tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"eos_token": "<|new_end|>"},
        {"pad_token": "[PAD]", "bos_token": None},
    ],
)
def test_what_the_config_adds_to_the_files(config: dict[str, Any], tmp_path: Path) -> None:
    same(folder_of(sentencepiece(specials=["[TOOL_CALLS]"]), tmp_path, **config))


def test_of_the_tiny_models_and_of_smollm2(tiny_model: Callable[..., Path], demo_model: Path) -> None:
    same(tiny_model("llama"))
    same(demo_model)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_are_rendered_as_transformers_does(tools: Any, tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = TEMPLATE
    folder = folder_of(tokenizer, tmp_path)
    ours, theirs = same(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for chat in (*CHATS, RICH):
        for prompted in (True, False):
            given = {"tools": tools, "add_generation_prompt": prompted, "more": "☃"}
            assert ours.apply_chat_template(chat, **given) == theirs.apply_chat_template(chat, tokenize=False, **given)


def test_several_templates_by_name(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    folder = folder_of(tokenizer, tmp_path)
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.chat_template == theirs.chat_template
    assert [ours.apply_chat_template(CHATS[0], tools=tools) for tools in (None, TOOLS)] == ["plain", "tools"]


def test_what_the_files_do_not_say_transformers_does_and_a_log_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A class for a Metaspace vocabulary makes its tokenizer in code."""
    folder = folder_of(sentencepiece(), tmp_path, tokenizer_class="LlamaTokenizer")
    assert not isinstance(load_tokenizer(str(folder)), FileTokenizer)
    assert "LlamaTokenizer makes one of its own" in caplog.text
    (folder / "tokenizer.json").unlink()
    load_tokenizer(str(folder))
    assert "no tokenizer.json" in caplog.text


def test_a_model_that_is_not_there_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="tokenizer of"):
        load_tokenizer(str(tmp_path / "nothing"))
    (folder_of(byte_level(), tmp_path / "m") / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(IncompleteModel, match="is no tokenizer"):
        load_tokenizer(str(tmp_path / "m"))


def test_an_identity_is_said_once_for_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = FullKV(name="full", first_layer=0, num_layers=3, num_kv_heads=2, head_dim=16, dtype="float32")
    said: list[ModelIdentity] = []

    def say() -> ModelIdentity:
        said.append(
            ModelIdentity(
                architecture="A", weights=f"w{len(said)}", config={"a": "1.5"}, dtype="float32", tokenizer="t",
                groups=(group,),
            )
        )  # fmt: skip
        return said[-1]

    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))
    (folder := tmp_path / "m").mkdir()
    (folder / "config.json").write_text("{}")
    first = remembered(folder, say, dtype="float32", group=group)
    assert remembered(folder, say, dtype="float32", group=group) == first and len(said) == 1
    assert remembered(folder, say, dtype="bfloat16", group=group) != first, "the engine runs it otherwise"
    (folder / "config.json").write_text("{ }")
    assert remembered(folder, say, dtype="bfloat16", group=group).weights == "w2", "another file"
    (folder / CACHE_NAME).write_bytes((folder / CACHE_NAME).read_bytes()[:-9])
    assert remembered(folder, say, dtype="bfloat16", group=group).weights == "w3", "what is damaged is said anew"
    assert remembered(tmp_path / "of the hub", say).weights == "w4"
    monkeypatch.setattr("thaw.engines.served.client.remembered.__version__", "another")
    assert remembered(folder, say, dtype="bfloat16", group=group).weights == "w5"


CLIENT = """
import resource, sys
from thaw.engines.hf.codec import HFCodec
from thaw.engines.hf.tokenizer import load_tokenizer
import thaw, thaw.engines.served.client.engine, thaw.engines.served.client.attach, thaw.engines.served.client.http
import thaw.engines.vllm, thaw.engines.vllm.client.http, thaw.engines.sglang, thaw.engines.sglang.client.engine
codec = HFCodec(load_tokenizer(sys.argv[1]))
ids = codec.render_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
assert "Hi" in codec.decode(ids)
loaded = {name.partition(".")[0] for name in sys.modules}
assert loaded.isdisjoint({"torch", "transformers", "vllm", "sglang"}), sorted(loaded)
print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
"""


def test_a_clients_tokenizer_loads_neither_torch_nor_transformers(demo_model: Path) -> None:
    """And all that a client of a served engine is made of costs less than a second of CPU with it."""
    pytest.importorskip("httpx")
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(demo_model)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) <= 1.0
