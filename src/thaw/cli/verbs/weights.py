"""`thaw weights`: models and adapters in the repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thaw.cli import boot, options, output, place, words
from thaw.cli.progress import Progress
from thaw.core.ids import short

if TYPE_CHECKING:
    from thaw.weights import ShownWeights, WeightsEntry

EXAMPLE = """
thaw weights add ~/models/Qwen3-0.6B
thaw run --model thaw:Qwen3-0.6B "What is a blob?"
thaw weights list
"""
ADD_EXAMPLE = """
thaw weights add ~/models/Qwen3-0.6B
thaw weights add runs/checkpoint-200 --name step-200
thaw weights add lora/ --base Qwen3-0.6B
"""


@click.group("weights", epilog="\b\nExample:\n" + "\n".join(f"  {line}" for line in EXAMPLE.strip().splitlines()))
def command() -> None:
    """Store a model's weights in the repository, and run it from there."""


@options.verb("add", ADD_EXAMPLE)
@click.argument("model")
@click.option("--name", metavar="NAME", help="What to call it; default: the folder's name.")
@click.option("--dtype", help="What the model runs in: bfloat16, float16 or float32; default: its config's.")
@click.option(
    "--base", metavar="NAME", help="The weights that an adapter was trained on: a set's name or a weights id."
)
@click.option("--link", is_flag=True, help="Leave the tensors in MODEL, which must stay as it is.")
@options.as_json
def add(
    named: str | None,
    model: str,
    name: str | None,
    dtype: str | None,
    base: str | None,
    link: bool,
    as_json: bool,
) -> None:
    """Store the model in folder MODEL (or a hub id that was downloaded): safetensors, tokenizer and configs.

    Each tensor is stored once, however many sets have it, so a fine-tune costs what it changed. A folder with an
    adapter_config.json is stored as an adapter."""
    boot.hush()
    with place.open_repository(named) as repo, Progress(f"storing {model}"):
        added = repo.weights.add(model, name, dtype=dtype, base=base, link=link)
    if as_json:
        output.print_json(added)
        return
    entry = added.entry
    output.line(f"{output.style(entry.name, 'bold', 'green')}  {short(entry.weights)}  {_what(entry)}")
    if not added.is_new:
        output.note("it was here already; nothing was written")
        return
    rate = f", {words.nbytes(int(entry.nbytes / max(added.seconds, 1e-9)))}/s" if added.num_written else ""
    if entry.link is not None:
        output.note(f"its tensors stay in {entry.link}")
        return
    output.note(
        f"{words.nbytes(added.nbytes_written)} written in {words.count(added.num_written, 'tensor')}; "
        f"{words.nbytes(entry.nbytes - added.nbytes_written)} was stored before ({words.seconds(added.seconds)}{rate})"
    )


@options.verb("list", "thaw weights list")
@options.as_json
def listing(named: str | None, as_json: bool) -> None:
    """List the models and adapters in the repository."""
    with place.open_repository(named) as repo:
        found = repo.weights.list()
    if as_json:
        output.print_json({"weights": found})
        return
    if not found:
        output.note("no weights yet: thaw weights add MODEL")
    output.rows([_row(entry) for entry in found])


@options.verb("show", "thaw weights show Qwen3-0.6B")
@click.argument("name")
@options.as_json
def show(named: str | None, name: str, as_json: bool) -> None:
    """Show a set: its id, dtype, files, what it shares, and the commits that need it. NAME may be a weights id."""
    with place.open_repository(named) as repo:
        found = repo.weights.show(name)
    if as_json:
        output.print_json(found)
        return
    _print(found)


@options.verb("rm", "thaw weights rm step-200")
@click.argument("name")
@click.option("--force", is_flag=True, help="Remove it even if commits were captured from these weights.")
@options.as_json
def rm(named: str | None, name: str, force: bool, as_json: bool) -> None:
    """Remove a set; refused while a commit needs its weights. `thaw gc` later frees what no other set shares."""
    with place.open_repository(named) as repo:
        gone = repo.weights.rm(name, force=force)
    if as_json:
        output.print_json(gone)
    else:
        output.line(f"removed {gone.name} (was {short(gone.weights)})")


@options.verb("checkout", "thaw weights checkout Qwen3-0.6B ~/models/Qwen3-0.6B")
@click.argument("name")
@click.argument("folder")
@options.as_json
def checkout(named: str | None, name: str, folder: str, as_json: bool) -> None:
    """Write a set into FOLDER as plain safetensors, for programs without thaw. Every byte is verified."""
    with place.open_repository(named) as repo, Progress(f"writing {folder}"):
        nbytes = repo.weights.checkout(name, folder)
    if as_json:
        output.print_json({"name": name, "folder": folder, "nbytes": nbytes})
    else:
        output.line(f"{folder}: {words.nbytes(nbytes)} of tensors")


def _what(entry: WeightsEntry) -> str:
    kind = "" if entry.kind == "model" else f"{entry.kind}, "
    kind += "linked, " if entry.link is not None else ""
    return f"{kind}{entry.architecture}, {entry.dtype}, {words.count(entry.num_tensors, 'tensor')}, " + words.nbytes(
        entry.nbytes
    )


def _row(entry: WeightsEntry) -> tuple[str, ...]:
    return output.style(entry.name, "bold", "green"), short(entry.weights), _what(entry)


def _print(found: ShownWeights) -> None:
    entry, manifest = found.entry, found.manifest
    output.line(f"{output.style(entry.name, 'bold', 'green')}  {_what(entry)}")
    output.line(f"weights   {entry.weights}")
    if manifest.base is not None:
        output.line(f"base      {manifest.base}")
    if entry.link is not None:
        output.line(f"link      {entry.link}")
    output.line(f"shared    {words.nbytes(found.shared_nbytes)} with other sets")
    output.line(f"commits   {words.count(found.num_commits, 'commit')}")
    output.line(f"files     {', '.join(sorted(manifest.files)) or 'none'}")
    if manifest.code:
        output.line(f"code      {', '.join(sorted(manifest.code))} (its hash only; thaw runs none)")


for one in (add, listing, show, rm, checkout):
    command.add_command(one)
