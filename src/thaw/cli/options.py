"""Options that several verbs share, as decorators: --json and -C on every verb, sampling, engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def verb(name: str, example: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A command whose help ends with an example. The function's docstring is the help text; it gets `named` (-C)."""

    def make(function: Callable[..., Any]) -> click.Command:
        epilog = "\b\nExample:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines())
        make_command: Callable[[Callable[..., Any]], click.Command] = click.command(name, epilog=epilog, **settings)
        return make_command(_place(function))

    return make


def _place(function: F) -> F:
    """-C before the verb or after it; after wins."""

    def chosen(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
        return value if value is not None else ctx.find_root().obj

    return click.option("-C", "--repo", "named", hidden=True, callback=chosen)(function)


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


def engine(function: F) -> F:
    """--engine, --model and how to load it; what is not given the repository remembers."""
    for option in (
        click.option("--device", help="cpu or cuda."),
        click.option("--dtype", help="bfloat16, float16 or float32; default: the weights' own."),
        click.option("--model", metavar="PATH", help="A model's folder (or hub id); remembered by the repository."),
        click.option("--engine", "engine_name", metavar="NAME", help="transformers (default), or another one."),
    ):
        function = option(function)
    return function


def sampling(function: F) -> F:
    """The fields of `Sampling`, by their names. Only what was given reaches the verb's `sampling`."""
    for option in reversed(
        (
            click.option("--max-tokens", type=int, metavar="N", help="At most this many new tokens (default 256)."),
            click.option("--temperature", type=float, metavar="T", help="0 is greedy (default 1)."),
            click.option("--top-p", type=float, metavar="P"),
            click.option("--top-k", type=int, metavar="K"),
            click.option("--min-p", type=float, metavar="P"),
            click.option("--seed", type=int, metavar="N", help="Default: the session's own."),
            click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
            click.option("--min-tokens", type=int, metavar="N"),
            click.option("--ignore-eos", is_flag=True, default=None, help="Go on after an end token."),
            click.option("--repetition-penalty", type=float, metavar="X"),
            click.option("--presence-penalty", type=float, metavar="X"),
            click.option("--frequency-penalty", type=float, metavar="X"),
            click.option("--logprobs", type=int, metavar="N", help="Keep the N likeliest alternatives of each token."),
        )
    ):
        function = option(function)
    return function


SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "min_tokens", "ignore_eos",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs",
)  # fmt: skip


def given_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Takes the sampling options out of a verb's arguments; those that were given, by name."""
    taken = {name: values.pop(name) for name in SAMPLING}
    return {name: value for name, value in taken.items() if value not in (None, ())}
