"""Parsers of an engine's own, run by its Python: real ones of vLLM and SGLang where their environments are.

The process itself is tested with one that is written here; what it answers is not what is tested then, but that nothing
is lost when it fails, ends or hangs.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from thaw.core.errors import InvalidRequest
from thaw.engines.fake.codec import FakeCodec
from thaw.engines.registry import OWN
from thaw.gateway.parsers.process import ParserProcess
from thaw.gateway.reading import SpeechReader, SpeechReaders
from thaw.gateway.speech import Said, Text, Thought, ToolCall, merged_said

ROOT = Path(__file__).resolve().parents[2]
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}},
    }
    for name in ("ls", "cat")
]
CALL = '<tool_call>\n{"name": "ls", "arguments": {"path": "/"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "cat", "arguments": {"path": "/etc"}}\n</tool_call>'


def python_of(engine: str) -> str:
    """The Python of an engine's environment (`make .venv-vllm`)."""
    python = ROOT / f".venv-{engine}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no .venv-{engine} here (make .venv-{engine})")
    return str(python)


def run(
    readers: SpeechReaders,
    ask: Callable[[Callable[..., SpeechReader]], Coroutine[Any, Any, Any]],
) -> Any:
    def reader(tools: Any = TOOLS, prompt_ids: tuple[int, ...] = (), **variables: Any) -> SpeechReader:
        return readers.reader(FakeCodec(), prompt_ids, tools, variables)

    async def all_of() -> Any:
        try:
            await readers.start()
            return await ask(reader)
        finally:
            await readers.close()

    return asyncio.run(all_of())


async def streamed(reader: SpeechReader, model: Tokens, text: str, num: int) -> list[Said]:
    """As an engine tells it, `num` tokens at a time."""
    ids, out = model.encode(text), list[Said]()
    for i in range(0, len(ids), num):
        out += await reader.push(model.text(ids[: i + num])[len(model.text(ids[:i])) :], ids[i : i + num])
    out += await reader.end()
    await reader.close()
    return shown(out)


def shown(said: list[Said]) -> list[Said]:
    """Blanks between calls are no one's promise, and arguments are compared as JSON."""
    out: list[Said] = []
    for one in merged_said(said):
        if isinstance(one, ToolCall):
            out.append(ToolCall(one.name, json.dumps(json.loads(one.arguments))))
        elif one.text.strip():
            out.append(type(one)(one.text.strip()))
    return out


LS, CAT = ToolCall("ls", '{"path": "/"}'), ToolCall("cat", '{"path": "/etc"}')


class Tokens:
    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.slow("starts a process that imports the engine")
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_reads_thoughts_and_calls(engine: str, thinking_model: Path) -> None:
    name = {"vllm": "hermes", "sglang": "qwen25"}[engine]
    readers = SpeechReaders(f"{engine}:{name}", f"{engine}:qwen3", python_of(engine), str(thinking_model))
    model = Tokens(thinking_model)

    async def ask(reader: Callable[..., SpeechReader]) -> None:
        text = f"<think>\nI should look.\n</think>\n\nLet me see.\n{CALL}"
        said = [Thought("I should look."), Text("Let me see."), LS]
        assert shown(await reader().whole(text, model.encode(text))) == said
        assert await streamed(reader(), model, text, 1) == said
        for text, said in (
            (f"I look.\n{CALL}", [Text("I look."), LS]),
            (f"{CALL}\n{OTHER}", [LS, CAT]),
            ("a < b", [Text("a < b")]),
        ):
            assert await streamed(reader(enable_thinking=False), model, text, 1) == said
            assert shown(await reader(enable_thinking=False).whole(text, model.encode(text))) == said
        plain = reader(tools=(), enable_thinking=False)
        assert shown(await plain.whole(CALL, model.encode(CALL))) == [Text(CALL)]

    run(readers, ask)


@pytest.fixture(scope="session")
def thinking_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with <think>, </think> and the marks of calls as tokens, as Qwen3 has them."""
    from tokenizers import AddedToken, Tokenizer

    folder = tmp_path_factory.mktemp("thinking")
    for file in demo_model.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow("starts a process that imports the engine")
def test_a_parser_that_is_not_there_is_refused_at_the_start(demo_model: Path) -> None:
    readers = SpeechReaders("sglang:nosuch", "none", python_of("sglang"), str(demo_model))

    async def ask(reader: Callable[..., SpeechReader]) -> None:
        raise AssertionError("it started")

    with pytest.raises(InvalidRequest, match="nosuch"):
        run(readers, ask)


def test_a_python_without_the_engine_is_refused() -> None:
    readers = SpeechReaders("vllm:hermes", "none", "/nowhere/python", "model")

    async def ask(reader: Callable[..., SpeechReader]) -> None:
        raise AssertionError("it started")

    with pytest.raises(InvalidRequest, match="--python"):
        run(readers, ask)


# -- the process

PARSERS = """
import os, sys, time
from thaw.gateway.parsers import child
from thaw.gateway.parsers.child import said_of

class Parser:
    def __init__(self): self.seen = ""
    def push(self, text, token_ids, *, finished):
        self.seen += text
        if "raise" in text: raise ValueError("secret")
        if "exit" in text and not os.path.exists(sys.argv[2]):
            open(sys.argv[2], "w").close()
            os._exit(1)
        if "always" in text: os._exit(1)
        if "hang" in text: time.sleep(60)
        print("noise on stdout")
        return said_of(None, f"[{len(self.seen)}:{text}]")
    def whole(self, text, token_ids): return self.push(text, token_ids, finished=True)

class Parsers:
    def __init__(self, model, tools, reasoning): pass
    def open(self, opened): return Parser()

PARSERS = Parsers
sys.modules["thaw.gateway.parsers.vllm"] = sys.modules["__main__"]
child.main()
"""


@pytest.fixture
def process(tmp_path: Path) -> ParserProcess:
    """One whose parser is written above, started as an engine's Python is."""
    script = tmp_path / "parsers.py"
    script.write_text(PARSERS)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    return ParserProcess(str(python), "vllm", str(tmp_path / "model"), "x", "")


def told(process: ParserProcess, *pieces: str) -> list[Said]:
    from thaw.gateway.parsers.process import ProcessReader

    async def all_of() -> list[Said]:
        reader = ProcessReader(process, (), {}, (), "")
        out = [said for piece in pieces for said in await reader.push(piece, (1,))]
        out += await reader.end()
        await reader.close()
        await process.close()
        return out

    return asyncio.run(all_of())


def test_a_process_that_ends_is_started_again_and_knows_what_was_said(process: ParserProcess) -> None:
    assert told(process, "ab", "exit", "cd") == [Text("[2:ab]"), Text("[6:exit]"), Text("[8:cd]"), Text("[8:]")]
    assert process.generation == 2


def test_what_a_parser_cannot_read_is_text_and_its_message_is_not_logged(
    process: ParserProcess, caplog: pytest.LogCaptureFixture
) -> None:
    assert told(process, "ab", "raise", "cd") == [Text("[2:ab]"), Text("raise"), Text("cd")]
    assert "ValueError" in caplog.text and "secret" not in caplog.text


def test_a_process_that_always_ends_leaves_text(process: ParserProcess) -> None:
    assert told(process, "ab", "always", "cd") == [Text("[2:ab]"), Text("always"), Text("cd")]


def test_a_process_that_hangs_is_ended(process: ParserProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    from thaw.gateway.parsers import process as module

    monkeypatch.setattr(module, "ANSWER_S", 1.0)
    assert told(process, "ab", "hang") == [Text("[2:ab]"), Text("hang")]


# -- of another distribution


def test_the_gateway_knows_no_engine_by_name() -> None:
    """The registry does. The modules of their parsers are named as they are, and are looked for by that."""
    names = "|".join(OWN)
    for file in (ROOT / "src/thaw/gateway").rglob("*.py"):
        assert file.stem in OWN or not re.search(f"[\"']({names})[\"']", file.read_text()), file


COLDBOX = """
from thaw.engines.kind import EngineKind
from thaw.gateway.parsers.child import said_of

class Coldbox(EngineKind):
    name = "coldbox"
    def load(self, **options): raise NotImplementedError

class Parsers:
    def __init__(self, model, tools, reasoning): self.kind = tools
    def open(self, opened): return self
    def push(self, text, token_ids, *, finished): return said_of(None, f"{self.kind}:{text}")
    def whole(self, text, token_ids): return self.push(text, token_ids, finished=True)

KIND, PARSERS = Coldbox(), Parsers
"""


@pytest.fixture
def coldbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution with an engine and its parsers; the folder of its metadata."""
    site = tmp_path / "site"
    about = site / "coldbox-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "coldbox.py").write_text(COLDBOX)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: coldbox\nVersion: 1.0\n")
    groups = "[thaw.engines]\ncoldbox = coldbox:KIND\n[thaw.parsers]\ncoldbox = coldbox:PARSERS\n"
    (about / "entry_points.txt").write_text(groups)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    return about


def test_an_engine_of_another_distribution_brings_its_parsers(coldbox: Path) -> None:
    async def ask(reader: Callable[..., SpeechReader]) -> list[Said]:
        return await reader().whole("abc", (1,))

    assert run(SpeechReaders("coldbox:loud", "none", sys.executable, "model"), ask) == [Text("loud:abc")]


def test_parsers_are_those_of_the_engines_that_the_registry_knows(coldbox: Path) -> None:
    """A module of this folder that is no engine's is none, nor is an engine without parsers."""
    for name in ("child", "wire", "fake", "transformers"):
        with pytest.raises(InvalidRequest, match=r"expected none, hermes, vllm:NAME, sglang:NAME or coldbox:NAME"):
            SpeechReaders(f"{name}:x", "none", sys.executable, "model")
    (coldbox / "entry_points.txt").write_text("[thaw.parsers]\ncoldbox = coldbox:PARSERS\n")
    with pytest.raises(InvalidRequest, match=r"hermes, vllm:NAME or sglang:NAME$"):
        SpeechReaders("coldbox:loud", "none", sys.executable, "model")
