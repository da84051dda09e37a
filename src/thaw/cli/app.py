"""The command group and the frame around it: parse, run one verb, turn what it raised into a message and a code.

Exit codes: 0 done; those of `thaw.core.errors` (2 the request, 3 refused, 4 conflict, 5 damaged, 6 storage, 7 a law
was broken, 8 stopped); 70 an error inside thaw; 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from thaw.cli import catalog

EPILOG = "Every verb has --help with an example. A point is main, main~2, main:turn=3, main:token=1200, a tag or an id."


class Verbs(click.Group):
    """Loads a verb's module when that verb is asked for, and not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(catalog.VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in catalog.VERBS:
            return None
        command: click.Command = importlib.import_module(f"thaw.cli.verbs.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in catalog.VERBS and not args[0].startswith("-"):
            ctx.fail(_unknown(args[0]))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, verbs in catalog.SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(7), text) for name, text in verbs.items()])


def _unknown(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(verb, catalog.VERBS, 2)
    hint = f"did you mean {' or '.join(near)}?" if near else "see thaw --help"
    return f"there is no verb {verb!r}; {hint}"


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from thaw._version import __version__

        click.echo(f"thaw {__version__}")
        ctx.exit()


@click.group(
    name="thaw",
    cls=Verbs,
    epilog=EPILOG,
    subcommand_metavar="VERB [ARGS]…",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("-C", "--repo", "named", metavar="PATH", help="The repository, or a folder that holds one in .thaw.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def thaw(ctx: click.Context, named: str | None) -> None:
    """git for a running LLM.

    thaw keeps a model's session (its KV cache, tokens and sampler) as an immutable commit, and goes on from it later,
    elsewhere, or several times at once, without prefilling again.

    The repository is the nearest .thaw at or above the current folder, unless -C or THAW_REPO names another.
    """
    ctx.obj = named


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _require_text(words)
        code = thaw.main(args=words, prog_name="thaw", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _reader_left()
    except (KeyboardInterrupt, click.Abort):
        return _report(words, "interrupted", "interrupted", 130)
    except click.ClickException as error:
        return _usage(words, error)
    except Exception as error:  # noqa: BLE001 - the last frame: everything becomes a message and a code
        return _failed(words, error)


def _require_text(words: list[str]) -> None:
    """Raise `click.UsageError` for an argument of bytes that are no UTF-8."""
    from thaw.core.text import is_text

    for number, word in enumerate(words, 1):
        if not is_text(word):
            raise click.UsageError(
                f"argument {number} is not UTF-8 text: {ascii(word)[:80]}. Write it in UTF-8; a file of such a name "
                "must be renamed, and a repository's folder can be named by the variable THAW_REPO."
            )


def _reader_left() -> int:
    """Whoever read our output closed it (`thaw log | head`): not an error, and nothing more can be said."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _usage(words: list[str], error: click.ClickException) -> int:
    message = error.format_message()
    context: Any = getattr(error, "ctx", None)
    if context is not None and "--json" not in words:
        message = f"{message}\ntry: {context.command_path} --help"
    return _report(words, "usage", message, 2)


def _failed(words: list[str], error: Exception) -> int:
    from thaw.core.errors import ThawError

    if os.environ.get("THAW_DEBUG"):
        import traceback

        traceback.print_exc()
    if isinstance(error, ThawError):
        return _report(words, error.kind, str(error), error.exit_code)
    text = f"{type(error).__name__}: {error}"
    return _report(
        words, "internal", f"an error inside thaw, not of yours: {text}\nTHAW_DEBUG=1 in front shows where.", 70
    )


def _report(words: list[str], kind: str, message: str, code: int) -> int:
    """Say it: as JSON on stdout when JSON was asked for, else on stderr."""
    from thaw.cli import output

    if "--json" in words:
        output.print_json({"error": {"kind": kind, "message": message}})
    else:
        output.say_error(message)
    return code
