"""`thaw match`: the longest stored prefix of a text or of token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thaw.cli import options, output, place, prompts, speak, words
from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.repo.resolve import ResolvedPoint

EXAMPLE = """
thaw match --file handbook.txt
thaw match --tokens "[9906, 1917, 11]" --json
"""


@options.verb("match", EXAMPLE)
@click.argument("text", required=False)
@click.option("--file", metavar="FILE", help="Read the text from FILE; - is stdin.")
@click.option("--tokens", metavar="IDS", help="Token ids instead of TEXT: a JSON list; - is stdin.")
@options.engine
@options.as_json
def command(
    named: str | None,
    text: str | None,
    file: str | None,
    tokens: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Find the longest stored prefix of TEXT, as a point to continue from.

    Text needs the model's tokenizer, so this loads the engine. Token ids do not.
    """
    if sum(value is not None for value in (text, file, tokens)) > 1:
        raise click.UsageError("give exactly one of TEXT, --file and --tokens.")
    if tokens is not None:
        ids, found = _match_tokens(named, _parse(tokens))
    else:
        given = prompts.from_file(file) if file is not None else prompts.from_arguments(text, or_stdin=True)
        ids, found = _match_text(named, given, engine_name, model, dtype, device)
    if as_json:
        matched = found.num_tokens if found else 0
        output.print_json({"num_tokens": len(ids), "num_matched": matched, "point": str(found) if found else None})
    elif found is None:
        output.line(f"nothing stored shares a prefix with these {words.count(len(ids), 'token')}")
    else:
        output.line(f"{found}  {found.num_tokens:,} of {words.count(len(ids), 'token')}")


def _match_tokens(named: str | None, ids: list[int]) -> tuple[list[int], ResolvedPoint | None]:
    with place.open_repository(named) as repo:
        return ids, repo.match(ids)


def _match_text(
    named: str | None, text: str, engine_name: str | None, model: str | None, dtype: str | None, device: str | None
) -> tuple[list[int], ResolvedPoint | None]:
    with speak.opened(named, engine_name, model, dtype, device) as repo:
        ids = repo.engine.codec.encode(text, first=True)
        return ids, repo.match(ids)


def _parse(tokens: str) -> list[int]:
    import msgspec

    try:
        return msgspec.json.decode(prompts.from_arguments(tokens, or_stdin=False), type=list[int])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"--tokens: {error}. Give a JSON list of integers.") from None
