"""Options that several verbs share, as decorators: --json and -C on every verb, sampling, engine."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from thaw.engines.kind import Server

F = TypeVar("F", bound=Callable[..., Any])


class Grouped(click.Option):
    """An option that --help lists under a heading of its own."""

    def __init__(self, *names: Any, group: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


class Number(click.FloatRange):
    """A number that is one: neither "nan" nor "inf"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found


CHILDREN = click.IntRange(1, 1 << 16)
"""How many there are to be of one point."""
MAX_BYTES = 1 << 62


def num_bytes(text: str) -> int:
    """A number of bytes as people write it: 4GiB, 512MiB, 64M, 1000. The `type` of an option."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise click.BadParameter(f"{text!r} is not a number of bytes; write 4GiB, 512MiB or 1000")
    count = float(found[1]) * 1024 ** " kmgt".index(found[2] or " ")
    if count > MAX_BYTES:
        raise click.BadParameter(f"{text[:40]!r} is too large")
    return int(count)


class Verb(click.Command):
    """A command whose --help keeps its own options apart from those that many verbs share."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "group", "Options"), []).append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


HELP = {"help_option_names": ["-h", "--help"]}
"""Of each command itself: click keeps the help option that it made first, whoever the parent was."""


def verb(name: str, example: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A command whose help ends with an example. The function's docstring is the help text; it gets `named` (-C)."""

    def make(function: Callable[..., Any]) -> click.Command:
        epilog = "\b\nExample:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines())
        make_command: Callable[[Callable[..., Any]], click.Command] = click.command(
            name, Verb, epilog=epilog, context_settings=HELP, **settings
        )
        return make_command(_place(function))

    return make


def _place(function: F) -> F:
    """-C before the verb or after it; after wins."""

    def chosen(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
        return value if value is not None else ctx.find_root().obj

    return click.option("-C", "--repo", "named", hidden=True, callback=chosen)(function)


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


def option_of(group: str, *names: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, cls=Grouped, group=group, **settings)


def _use_key(_: click.Context, __: click.Parameter, value: str | None) -> None:
    """Whatever joins a server finds it there, processes that the verb starts as well."""
    if value is not None:
        from thaw.engines.keys import VARIABLE, check_key

        os.environ[VARIABLE] = check_key(value, "--api-key")


api_key = option_of(
    "Engine", "--api-key", metavar="KEY", expose_value=False, callback=_use_key,
    help="The server's API key. Other users can see command lines: prefer the variable THAW_API_KEY.",
)  # fmt: skip


def loading(function: F) -> F:
    """--model and how to load it; what is not given the repository remembers. --api-key."""
    for option in (
        api_key,
        option_of("Engine", "--device", help="cpu or cuda."),
        option_of("Engine", "--dtype", help="bfloat16, float16 or float32; default: that of the weights."),
        option_of("Engine", "--model", metavar="PATH", help="A folder, a hub id or thaw:NAME (`thaw weights`)."),
    ):
        function = option(function)
    return function


ENGINE = "An engine's name or a server's URL; default: the repository's, else transformers."


def engine(function: F) -> F:
    """--engine, and what `loading` has."""
    named = option_of("Engine", "--engine", "engine_name", metavar="NAME", help=ENGINE)
    return named(loading(function))


def engines(function: F) -> F:
    """As `engine`, for a verb that may have several."""
    about = f"{ENGINE} Repeat it to use several servers that run one model."
    named = option_of("Engine", "--engine", "engine_names", metavar="NAME", multiple=True, help=about)
    return named(loading(function))


def sampling(function: F) -> F:
    """The fields of `Sampling`, by their names. Only what was given reaches the verb's `sampling`."""
    for option in reversed(
        (
            option_of("Sampling", "--max-tokens", type=int, metavar="N", help="Generate at most N tokens (256)."),
            option_of(
                "Sampling", "--temperature", type=float, metavar="T", help="Sampling temperature; 0 is greedy (1)."
            ),
            option_of("Sampling", "--top-p", type=float, metavar="P", help="Sample from the top P of probability (1)."),
            option_of(
                "Sampling", "--top-k", type=int, metavar="K", help="Sample from the K likeliest tokens; 0 is all (0)."
            ),
            option_of("Sampling", "--min-p", type=float, metavar="P", help="Drop tokens below P × the likeliest (0)."),
            option_of("Sampling", "--seed", type=int, metavar="N", help="Default: the session's seed."),
            option_of("Sampling", "--stop", multiple=True, metavar="TEXT", help="Stop before this text; repeatable."),
            option_of("Sampling", "--min-tokens", type=int, metavar="N", help="Generate at least N tokens (0)."),
            option_of("Sampling", "--ignore-eos", is_flag=True, default=None, help="Do not stop at an end token."),
            option_of("Sampling", "--repetition-penalty", type=float, metavar="X", help="1 is none (1)."),
            option_of("Sampling", "--presence-penalty", type=float, metavar="X", help="0 is none (0)."),
            option_of("Sampling", "--frequency-penalty", type=float, metavar="X", help="0 is none (0)."),
            option_of(
                "Sampling", "--bad-words", multiple=True, metavar="TEXT", help="Never generate this; repeatable."
            ),
            option_of(
                "Sampling", "--logprobs", type=int, metavar="N", help="Record the N likeliest tokens at each position."
            ),
        )
    ):
        function = option(function)
    return function


def points(function: F) -> F:
    """--point and --unaligned: states to keep for later forks, on models with recurrent layers."""
    for option in (
        option_of("Points", "--unaligned", is_flag=True, help="Allow any token for --point; this changes the bits."),
        option_of(
            "Points", "--point", "points", type=click.IntRange(min=1), multiple=True, metavar="TOKEN",
            help="Keep the state after TOKEN tokens of the session, to fork there; repeatable.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def chat(function: F) -> F:
    """--chat, and what belongs to it."""
    about = "PROMPT is the user's next message, rendered by the model's template."
    for option in reversed(
        (
            option_of("Chat", "--chat", is_flag=True, help=about),
            option_of("Chat", "--system", metavar="TEXT", help="The system message; starts a conversation."),
            option_of("Chat", "--tools", metavar="FILE", help="A JSON list of tools, as JSON schemas; - is stdin."),
            option_of(
                "Chat", "--template-var", "template_vars", multiple=True, metavar="NAME=VALUE",
                help="Set a template variable, e.g. enable_thinking=false; repeatable.",
            ),
            option_of("Chat", "--prefill", metavar="TEXT", help="Start the answer with this text."),
            option_of("Chat", "--keep-sampled", is_flag=True, help="Keep sampled tokens that the template would drop."),
        )
    ):  # fmt: skip
        function = option(function)
    return function


def server_of(name: str) -> Server:
    """The server of the engine that an option names."""
    from thaw.serve.command import server_of

    with has_server():
        return server_of(name)


@contextmanager
def has_server() -> Iterator[None]:
    """An engine without a server is a wrong option."""
    from thaw.serve.command import NoServer

    try:
        yield
    except NoServer as error:
        raise click.BadParameter(str(error)) from None


SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "min_tokens", "ignore_eos",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "bad_words", "logprobs",
)  # fmt: skip


def given_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Takes the sampling options out of a verb's arguments; those that were given, by name."""
    taken = {name: values.pop(name) for name in SAMPLING}
    return {name: value for name, value in taken.items() if value not in (None, ())}
