"""The frame around a command: find out what was asked, run one verb, turn what it raised into a message and a code.

Verbs that only read are run without click where their words are plain (`light`).

Exit codes: 0 done; those of `thaw.core.errors` (2 the request, 3 refused, 4 conflict, 5 damaged, 6 storage, 7 a law
was broken, 8 stopped); 70 an error inside thaw; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thaw.cli import catalog, light

if TYPE_CHECKING:
    import click


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _require_text(words)
        verb = light.plain(words, catalog.LIGHT)
        code = _clicked(words) if verb is None else verb()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _reader_left()
    except KeyboardInterrupt:
        return _interrupted(words)
    except Exception as error:  # noqa: BLE001 - the last frame: everything becomes a message and a code
        return _failed(words, error)


def _require_text(words: list[str]) -> None:
    """Raise a usage error for an argument of bytes that are no UTF-8."""
    if all(map(str.isascii, words)):
        return
    from thaw.core.text import is_text

    for number, word in enumerate(words, 1):
        if not is_text(word):
            raise light.usage(
                f"argument {number} is not UTF-8 text: {ascii(word)[:80]}. Write it in UTF-8. Rename a file "
                "with such a name; a repository's folder can be given in the variable THAW_REPO."
            )


def _clicked(words: list[str]) -> Any:
    from thaw.cli.group import thaw

    return thaw.main(args=words, prog_name="thaw", standalone_mode=False)


def _interrupted(words: list[str]) -> int:
    return _report(words, "interrupted", "interrupted", 130)


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
    import click

    from thaw.core.errors import ThawError

    if isinstance(error, click.Abort):
        return _interrupted(words)
    if isinstance(error, click.ClickException):
        return _usage(words, error)
    if os.environ.get("THAW_DEBUG"):
        import traceback

        traceback.print_exc()
    if isinstance(error, ThawError):
        return _report(words, error.kind, str(error), error.exit_code)
    text = f"{type(error).__name__}: {error}"
    return _report(
        words, "internal", f"this is a bug in thaw: {text}\nRun again with THAW_DEBUG=1 for a traceback.", 70
    )


def _report(words: list[str], kind: str, message: str, code: int) -> int:
    """Say it: as JSON on stdout when JSON was asked for, else on stderr."""
    from thaw.cli import output

    if "--json" in words:
        output.print_json({"error": {"kind": kind, "message": message}})
    else:
        output.say_error(message)
    return code
