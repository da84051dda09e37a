"""The command group for click: which verbs there are, and their help."""

from __future__ import annotations

import importlib
import os

import click

from thaw.cli import catalog
from thaw.cli.light import Light

EPILOG = "Every verb has --help with an example. A POINT is main, main~2, main:turn=3, main:token=1200, a tag or an id."


class Verbs(click.Group):
    """Loads a verb's module when that verb is asked for, and not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(catalog.VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in catalog.VERBS:
            return None
        command: click.Command | Light = importlib.import_module(f"thaw.cli.verbs.{cmd_name}").command
        return command.command() if isinstance(command, Light) else command

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


def _use_namespace(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    """For the verb that follows, and the processes that it starts."""
    if name is None:
        return
    from thaw.cli import place
    from thaw.core import namespaces

    before = os.environ.get(place.NAMESPACE)
    os.environ[place.NAMESPACE] = namespaces.check(name)

    def restore() -> None:
        os.environ.pop(place.NAMESPACE, None)
        if before is not None:
            os.environ[place.NAMESPACE] = before

    ctx.call_on_close(restore)


@click.group(
    name="thaw",
    cls=Verbs,
    epilog=EPILOG,
    subcommand_metavar="VERB [ARGS]…",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("-C", "--repo", "named", metavar="PATH", help="The repository, or a folder with a .thaw in it.")
@click.option(
    "--namespace",
    metavar="NAME",
    expose_value=False,
    callback=_use_namespace,
    help="The tenant whose branches, tags and commits to use. Default: THAW_NAMESPACE, else no namespace.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def thaw(ctx: click.Context, named: str | None) -> None:
    """git for a running LLM.

    thaw saves a model's session (its KV cache, tokens and sampler state) as an immutable commit. Later, on another
    engine, or several times at once, it continues from that commit without prefilling again.

    The repository is the nearest .thaw in the current folder or above it. -C or THAW_REPO names another.
    """
    ctx.obj = named
