"""`thaw init`: make a repository."""

from __future__ import annotations

from pathlib import Path

import click

from thaw.cli import boot, options, output
from thaw.cli.place import FOLDER

EXAMPLE = """
thaw init
thaw init experiments --model ~/models/Qwen3-0.6B
"""


@options.verb("init", EXAMPLE)
@click.argument("folder", required=False)
@options.engine
@options.as_json
def command(
    named: str | None,
    folder: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Create a repository in FOLDER/.thaw (default: here). It remembers the model if you name one."""
    from thaw.repo.repository import init
    from thaw.repo.settings import remember

    path = Path(folder or named or ".").expanduser() / FOLDER
    wanted = engine_name is not None or model is not None
    chosen = boot.choose(None, engine_name, model, dtype, device) if wanted else None
    with init(path) as repo:
        if chosen is not None:
            remember(repo.store, chosen)
        uuid = repo.store.uuid
    if as_json:
        output.print_json({"path": str(path.resolve()), "uuid": uuid, "engine": chosen})
    else:
        output.line(f"created an empty repository in {path.resolve()}")
        if chosen is None:
            output.note("next: thaw run --model PATH --file document.txt 'A question?'")
