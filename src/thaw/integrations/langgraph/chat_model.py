"""`ChatThaw`: a LangChain chat model whose answers carry the point that they end at.

    model = ChatThaw(repo=thaw.open("runs", engine=engine))        # or pool=…, or base_url= and api_key= of a gateway
    answer = model.invoke(messages)
    answer.response_metadata["thaw"]["point"]                      # the commit; thaw log, show, diff, verify, adopt …

The messages decide where a call goes on: from the deepest one that carries a point and fits those before it. So a
checkpoint that is opened again, a list of messages that is cut, and a fork by `update_state` prefill nothing twice.
What is not usable (another model, freed, another repository) is read again, and the answer's record says why.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from thaw.core.errors import InvalidRequest, Unsupported
from thaw.core.sampling import Sampling
from thaw.core.text import require_text
from thaw.integrations.langgraph.asking import AnswerPart, CallMade, ChatAnswer, ChatAsk, ChatSource
from thaw.integrations.langgraph.messages import KEY, as_openai, carried, last_said, told
from thaw.pool import ForkPool
from thaw.repo import Repository
from thaw.repo.aio import AsyncRepository
from thaw.repo.bridge import call

log = logging.getLogger("thaw.integrations.langgraph")
SAMPLING = frozenset(field.name for field in msgspec.structs.fields(Sampling))
IDLE = frozenset({"stream", "ls_structured_output_format"})
"""Names that LangChain passes along and that change no answer."""


class ChatThaw(BaseChatModel):
    """Give one of: `repo`, an open repository with an engine; `pool`, a fork pool with a repository; `base_url` and
    `api_key` of a gateway. Safe from any thread. `close` closes the sessions that it keeps open, and nothing else.

    `sampling` is for all calls, and `bind(temperature=0, …)` or a call's own arguments change fields of it.
    `tool_calls`: how the model writes calls, "none" or "hermes" (a gateway has its own `--tool-calls`). `match`: a
    conversation that carries no usable point goes on from the longest stored prefix of its tokens. `live_sessions`: how
    many sessions stay open behind the last answers. `keep_sampled`: see docs/chat.md. `note`: the commits' message;
    "" takes the last thing that a human said.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    repo: Repository | AsyncRepository | None = Field(default=None, exclude=True, repr=False)
    pool: ForkPool | None = Field(default=None, exclude=True, repr=False)
    base_url: str | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True)
    model: str = ""
    sampling: Sampling = Sampling()
    tool_calls: str = "none"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    keep_sampled: bool = False
    match: bool = True
    note: str = ""
    live_sessions: int = 8
    timeout_s: float = 600.0
    _source: ChatSource = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Raises `InvalidRequest` unless it is clear where answers come from."""
        super().model_post_init(context)
        require_text(self.note, "note")
        given = [name for name in ("repo", "pool", "base_url") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(f"ChatThaw: give one of repo, pool, base_url; given: {', '.join(given) or 'none'}")
        self._source = self._gateway() if self.base_url is not None else self._engine()

    def _gateway(self) -> ChatSource:
        from thaw.integrations.langgraph.remote import GatewaySource

        key = "" if self.api_key is None else self.api_key.get_secret_value()
        return GatewaySource(str(self.base_url), key, self.model, self.timeout_s)

    def _engine(self) -> ChatSource:
        from thaw.integrations.langgraph.local import EngineSource

        repo = self.repo.sync if isinstance(self.repo, AsyncRepository) else self.repo
        pool = self.pool
        options: dict[str, Any] = {
            "tool_calls": self.tool_calls, "match": self.match, "live_sessions": self.live_sessions,
        }  # fmt: skip
        if pool is not None:
            if pool.repo is None:
                raise InvalidRequest("the pool has no repository, where answers are committed: ForkPool(…, repo=…)")
            return EngineSource(pool.repo, lambda: _engine_of(pool), pool.session, **options)
        assert repo is not None
        return EngineSource(repo, lambda: repo.engine, repo.session, **options)

    def close(self) -> None:
        """Close the sessions behind the last answers. Their points stay."""
        self._source.close()

    # -- what LangChain asks

    @property
    def _llm_type(self) -> str:
        return "thaw"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What an answer depends on besides its messages (the key of LangChain's caches)."""
        return {
            "model": self._source.model, "sampling": msgspec.to_builtins(self.sampling, enc_hook=int),
            "chat_template_kwargs": self.chat_template_kwargs, "keep_sampled": self.keep_sampled,
        }  # fmt: skip

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        ask = self._ask(messages, stop, kwargs)
        return self._result(ask, self._source.answers(ask))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        ask = await call(self._ask, messages, stop, kwargs)
        return self._result(ask, await self._source.aanswers(ask))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        ask, num_calls = self._ask_one(messages, stop, kwargs), 0
        for part in self._source.stream(ask):
            chunk = self._chunk(ask, part, num_calls)
            num_calls += isinstance(part, AnswerPart) and part.call is not None
            if run_manager:
                run_manager.on_llm_new_token(str(chunk.message.content), chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        ask, num_calls = await call(self._ask_one, messages, stop, kwargs), 0
        async for part in self._source.astream(ask):
            chunk = self._chunk(ask, part, num_calls)
            num_calls += isinstance(part, AnswerPart) and part.call is not None
            if run_manager:
                await run_manager.on_llm_new_token(str(chunk.message.content), chunk=chunk)
            yield chunk

    # -- several answers

    def attempts(self, messages: LanguageModelInput, n: int, **kwargs: Any) -> list[AIMessage]:
        """`n` answers to the same messages, which are read once; in one batch, each with a point of its own."""
        found = self.generate([self._convert_input(messages).to_messages()], n=n, stream=False, **kwargs)
        return [_message_of(one) for one in found.generations[0]]

    async def aattempts(self, messages: LanguageModelInput, n: int, **kwargs: Any) -> list[AIMessage]:
        """As `attempts`."""
        found = await self.agenerate([self._convert_input(messages).to_messages()], n=n, stream=False, **kwargs)
        return [_message_of(one) for one in found.generations[0]]

    # -- tools and structured output

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools. Raises `Unsupported` for what would force a call, or hold it to anything."""
        if tool_choice not in (None, False, "auto", "none"):
            raise Unsupported(f"tool_choice={tool_choice!r}: a call cannot be forced; use 'auto' or 'none'")
        if parallel_tool_calls is False or strict:
            name = "strict" if strict else "parallel_tool_calls"
            raise Unsupported(f"{name}: how a model calls tools is not constrained; leave it out")
        if self.base_url is None and self.tool_calls == "none":
            raise InvalidRequest(
                "bind_tools: say how the model writes its calls, ChatThaw(tool_calls='hermes'); with 'none' they would "
                "stay text"
            )
        shown = [] if tool_choice == "none" else [convert_to_openai_tool(tool) for tool in tools]
        return self.bind(tools=sorted(shown, key=lambda tool: str(tool["function"]["name"])), **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "json_mode"] = "json_schema",
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers that the engine holds to a JSON schema while it samples, parsed. `schema`: as in LangChain.

        Raises `Unsupported` where the engine has no structured output."""
        if method not in ("json_schema", "json_mode"):
            raise Unsupported(f"method={method!r}: must be json_schema or json_mode; a call cannot be forced")
        unknown = sorted(kwargs.keys() - {"strict"})
        if unknown:
            raise InvalidRequest(f"with_structured_output: unknown argument {unknown[0]!r}")
        self._source.require_structured()
        wanted = {"type": "object"} if method == "json_mode" else _schema(schema)
        model = self.bind(structured_outputs={"json": json.dumps(wanted)})
        parser: Runnable[Any, Any] = (
            PydanticOutputParser(pydantic_object=schema)
            if isinstance(schema, type) and is_basemodel_subclass(schema)
            else JsonOutputParser()
        )
        if not include_raw:
            return model | parser
        fields: Any = {"parsing_error": lambda _: None}
        parsed: Any = RunnablePassthrough.assign(parsed=lambda found: parser.invoke(found["raw"]), **fields)
        failed: Any = RunnablePassthrough.assign(parsed=lambda _: None)
        whole: Runnable[LanguageModelInput, Any] = RunnableMap(raw=model) | parsed.with_fallbacks(
            [failed], exception_key="parsing_error"
        )
        return whole

    # -- asking

    def _ask_one(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> ChatAsk:
        ask = self._ask(messages, stop, kwargs)
        if ask.n != 1:
            raise Unsupported(f"n={ask.n}: a stream has one answer; use attempts(messages, n)")
        return ask

    def _ask(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> ChatAsk:
        given = {name: value for name, value in kwargs.items() if name not in IDLE}
        changed = {name: given.pop(name) for name in SAMPLING & given.keys()}
        if stop:
            changed["stop"] = tuple(stop)
        n, tools = given.pop("n", 1), given.pop("tools", ())
        variables = {**self.chat_template_kwargs, **given.pop("chat_template_kwargs", {})}
        if given:
            known = ", ".join(sorted(SAMPLING))
            raise InvalidRequest(f"ChatThaw: unknown argument {min(given)!r}; sampling has {known}")
        if type(n) is not int or n < 1:
            raise InvalidRequest(f"n={n!r}: how many answers, at least 1")
        _require_json("chat_template_kwargs", variables)
        _require_json("tools", tools)
        said = as_openai(messages)
        return ChatAsk(
            messages=tuple(said),
            carried=tuple(carried(messages, told(said))),
            tools=tuple(tools),
            variables=variables,
            sampling=_changed(self.sampling, changed),
            n=n,
            keep_sampled=self.keep_sampled,
            note=self.note or last_said(said),
        )

    # -- answering

    def _result(self, ask: ChatAsk, answers: Sequence[ChatAnswer]) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._message(ask, one)) for one in answers])

    def _message(self, ask: ChatAsk, answer: ChatAnswer) -> AIMessage:
        read = [_read(one) for one in answer.calls]
        message = AIMessage(
            content=answer.text,
            tool_calls=[one for one in read if one["type"] == "tool_call"],
            invalid_tool_calls=[one for one in read if one["type"] == "invalid_tool_call"],
            usage_metadata=_usage(answer),
        )
        message.response_metadata = self._about(ask, answer, message)
        return message

    def _about(self, ask: ChatAsk, answer: ChatAnswer, message: AIMessage) -> dict[str, Any]:
        again = answer.record.get("reread")
        if isinstance(again, Mapping):
            log.warning("the messages' point was not used, their tokens were read again: %s", again.get("kind"))
        digest = told([*ask.messages, *as_openai([message])])[-1]
        return {
            "model_name": self._source.model,
            "finish_reason": answer.finish_reason,
            KEY: {**answer.record, "digest": digest},
        }

    def _chunk(self, ask: ChatAsk, part: AnswerPart | ChatAnswer, number: int) -> ChatGenerationChunk:
        if isinstance(part, ChatAnswer):
            about = self._message(ask, part).response_metadata
            last = AIMessageChunk(
                content="", usage_metadata=_usage(part), response_metadata=about, chunk_position="last"
            )
            return ChatGenerationChunk(message=last)
        if part.call is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=part.text))
        made = tool_call_chunk(name=part.call.name, args=part.call.arguments, id=part.call.id, index=number)
        return ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[made]))


def _engine_of(pool: ForkPool) -> Any:
    """That of a worker of the pool's."""
    with pool.session() as session:
        return session.engine


def _changed(sampling: Sampling, changed: Mapping[str, Any]) -> Sampling:
    """Raises `BadSampling`."""
    fields = {name: getattr(sampling, name) for name in SAMPLING}
    return Sampling(**{**fields, **changed}) if changed else sampling


def _require_json(name: str, value: object) -> None:
    """Raises `InvalidRequest` for what can be neither recorded with a turn nor sent."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{name}: must be JSON values: {ascii(str(error))[:200]}") from None


def _schema(schema: dict[str, Any] | type) -> dict[str, Any]:
    """The JSON schema of what LangChain takes for one."""
    function: dict[str, Any] = convert_to_openai_tool(schema)["function"]
    parameters: dict[str, Any] = function["parameters"]
    return parameters


def _read(made: CallMade) -> dict[str, Any]:
    """A call whose arguments are an object, or one that is marked as invalid."""
    try:
        arguments = json.loads(made.arguments)
    except ValueError:
        arguments = None
    if isinstance(arguments, dict):
        return {**tool_call(name=made.name, args=arguments, id=made.id)}
    why = "the arguments are no JSON object"
    return {**invalid_tool_call(name=made.name, args=made.arguments, id=made.id, error=why)}


def _usage(answer: ChatAnswer) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=answer.num_prompt,
        output_tokens=answer.num_completion,
        total_tokens=answer.num_prompt + answer.num_completion,
        input_token_details={"cache_read": answer.num_cached},
    )


def _message_of(generation: Any) -> AIMessage:
    message: AIMessage = generation.message
    return message
