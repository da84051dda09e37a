"""`thaw diff`: where two points part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thaw.cli import light, output, view, words
from thaw.cli.place import open_repository

if TYPE_CHECKING:
    from thaw.repo.diff import Diff, Side

EXAMPLE = """
thaw diff fork/0 fork/1
thaw diff main main@{1} --json
"""
LINES, COMMON_LINES = 12, 3


@light.verb(
    "diff", EXAMPLE, light.Argument("a", required=True, metavar="A"), light.Argument("b", default="HEAD", metavar="B")
)
def command(named: str | None, a: str, b: str, as_json: bool) -> None:
    """Show where A and B (default: HEAD) diverge: common point, both texts from there, logprobs, bytes.

    Compares tokens, not history. The exit code is 0 whether they differ or not.
    """
    with open_repository(named) as repo:
        found = repo.diff(a, b)
    if as_json:
        output.print_json({**{k: getattr(found, k) for k in found.__struct_fields__}, "equal": found.equal})
    else:
        _print(found, a, b)


def _print(found: Diff, a: str, b: str) -> None:
    output.line(f"{output.style('common', 'bold')}  {words.count(found.num_common_tokens, 'token')}{_model(found)}")
    if found.equal:
        output.line("        the two points are equal, token for token")
    elif found.common_text_end:
        for each in view.wrapped(found.common_text_end.lstrip(), output.width() - 8)[-COMMON_LINES:]:
            output.line(f"        {output.style(each, 'dim')}".rstrip())
    if not found.equal:
        _side(found.a, a, "-", "red")
        _side(found.b, b, "+", "green")
    output.line()
    output.line(
        f"{output.style('bytes', 'bold')}   {words.nbytes(found.nbytes_shared)} shared, "
        f"{words.nbytes(found.a.nbytes_own)} only {a}, {words.nbytes(found.b.nbytes_own)} only {b}"
    )


def _model(found: Diff) -> str:
    return "" if found.same_model else output.style("  (of different models: their KV is not comparable)", "yellow")


def _side(side: Side, name: str, sign: str, colour: str) -> None:
    output.line()
    first = f"{sign} {name}"
    own = f"{words.count(side.num_own_tokens, 'token')} of its own{_first_token(side)}"
    output.line(f"{output.style(first, 'bold', colour)}  {output.style(own, 'dim')}")
    if side.num_own_tokens:
        bar = output.style(sign, colour)
        for each in view.wrapped(side.text, output.width() - 2)[:LINES]:
            output.line(f"{bar} {each}".rstrip())


def _first_token(side: Side) -> str:
    if side.token is None:
        return "; it ends at the common point"
    text = f"; token {side.token} at {side.num_tokens - side.num_own_tokens:,}"
    if side.logprob is None:
        return f"{text}, given in a prompt"
    return f"{text}, logprob {side.logprob:.4f}"
