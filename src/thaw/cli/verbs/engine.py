"""`thaw engine config`: what a stock engine needs to be told, as a file. With `stats` and `switch` beside it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thaw.cli import options, output, place
from thaw.cli.verbs import engine_drain, engine_live, engine_sleep, engine_whole

if TYPE_CHECKING:
    from thaw.engines.kind import Server

EXAMPLE = """
thaw engine config vllm --out thaw.yaml --store runs
vllm serve path/to/model --config thaw.yaml
thaw run --engine http://localhost:8000 "Why?"
"""
FILE = "thaw.yaml"


@click.group("engine", epilog="\b\nExample:\n" + "\n".join(f"  {line}" for line in EXAMPLE.strip().splitlines()))
def command() -> None:
    """Configure a stock engine for thaw; inspect a running one."""


@options.verb("config", EXAMPLE)
@click.argument("engine", metavar="ENGINE")
@click.option("--out", metavar="FILE", default=FILE, show_default=True, help="File to write; - is stdout.")
@click.option("--force", is_flag=True, help="Replace FILE.")
@click.option("--store", "stores", multiple=True, metavar="FOLDER",
              help="A repository that the engine may use from the start; repeatable. UUID=FOLDER names a folder of "
              "packs by the path that the engine sees.")  # fmt: skip
@click.option("--mail", metavar="FOLDER", help="Folder through which client and engine exchange files; default: "
              "a new one in the user's runtime folder.")  # fmt: skip
@click.option("--arena", type=options.num_bytes, metavar="BYTES", help="Host memory for sessions; default: 4GiB.")
@click.option(
    "--spill", metavar="FOLDER", help="Folder for KV that does not fit in the arena; default: the temporary folder."
)
@click.option("--beside", "others", multiple=True, metavar="CONNECTOR",
              help="vllm: another connector to run next to thaw's in a MultiConnector, by name or as "
              "--kv-transfer-config JSON; repeatable.")  # fmt: skip
@options.as_json
def config(
    named: str | None,
    engine: str,
    out: str,
    force: bool,
    stores: tuple[str, ...],
    mail: str | None,
    arena: int | None,
    spill: str | None,
    others: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the --config file that loads thaw into a stock server, and print how to start the server.

    ENGINE is one whose server reads such a file (vllm). thaw must be installed in the server's environment. A client
    of the same user on the same host registers its own repository, so it needs no --store.
    """
    from thaw.engines.kind import Settings

    del named  # the repositories are named with --store
    server = options.server_of(engine)
    if not server.config_suffixes:
        raise click.BadParameter(f"{server.title} does not read a thaw config file ({server.by_hand})")
    told = Settings(
        stores=dict(_store(store) for store in stores),
        mail=_absolute(mail),
        arena_nbytes=arena,
        spill=_absolute(spill),
        beside=tuple(_other(text) for text in others),
    )
    wanted = server.config_file(told)
    if out == "-":
        output.write(wanted.text)
        return
    path = _path(out, server)
    keep(path, wanted.text, force)
    (usual, _), *more = server.config_commands(path)
    if as_json:
        output.print_json({"path": str(path.absolute()), "mail": wanted.mail, "command": usual})
        return
    output.line(f"wrote {path}. Start the server with")
    output.line(f"  {shlex.join(usual)}")
    for words, remark in more:
        output.line(f"  {shlex.join(words)}   ({remark})")


def keep(path: Path, text: str, force: bool) -> None:
    """Write it for this user alone. Raises `Conflict` rather than replace a file unasked."""
    from thaw.core.errors import Conflict

    if path.exists() and not force:
        raise Conflict(f"{path} already exists. Name another file with --out, or replace it with --force.")
    output.write_file(path, text.encode())


def _path(out: str, server: Server) -> Path:
    path, known = Path(out).expanduser(), server.config_suffixes
    if path.suffix not in known:
        raise click.BadParameter(f"{server.title} only reads files whose names end in {known[0]}; {out} does not.")
    return path


def _store(text: str) -> tuple[str, str]:
    """(UUID, folder of packs) of a repository here, or as given."""
    uuid, given, folder = text.partition("=")
    if given:
        return uuid, folder
    with place.open_repository(text) as repo:
        return repo.store.uuid, str(repo.store.packs.resolve())


def _other(text: str) -> str | dict[str, object]:
    """A connector's name, or what its JSON says."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        found: dict[str, object] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"--beside {text[:80]}: not valid JSON ({error})") from None
    return found


def _absolute(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).expanduser().resolve())


VERBS = (
    config, engine_live.stats, engine_live.switch, engine_drain.drain, engine_whole.snapshot, engine_whole.show,
    engine_whole.restore, engine_sleep.sleep, engine_sleep.wake,
)  # fmt: skip
for verb in VERBS:
    command.add_command(verb)
