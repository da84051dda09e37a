"""`thaw clone`: a new repository from a remote."""

from __future__ import annotations

from pathlib import Path

import click

from thaw.cli import boot, options, output, place, transfer
from thaw.cli.place import FOLDER

EXAMPLE = """
thaw clone s3://bucket/runs --model ~/models/Qwen3-0.6B
thaw clone s3://bucket/runs here --single-branch
thaw clone s3://bucket/runs here --refs-only
thaw clone s3://bucket/runs here --depth 1
"""


@options.verb("clone", EXAMPLE)
@click.argument("url")
@click.argument("folder", required=False)
@click.option("-b", "--branch", metavar="NAME", help="Start on this branch; default: the remote's.")
@click.option("--single-branch", is_flag=True, help="Fetch no other branch.")
@click.option("--refs-only", is_flag=True, help="Fetch no branch yet: each is fetched when a verb first names it.")
@click.option("--depth", type=click.IntRange(min=1), metavar="N", help="Fetch only the last N commits of each branch.")
@click.option("--origin", "remote", metavar="NAME", default="origin", help="What to call the remote (origin).")
@click.option("--weights", is_flag=True, help="Also fetch the weights that the commits need.")
@transfer.option
@options.engine
@options.as_json
def command(
    named: str | None,
    url: str,
    folder: str | None,
    branch: str | None,
    single_branch: bool,
    refs_only: bool,
    depth: int | None,
    remote: str,
    weights: bool,
    pairs: tuple[str, ...],
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Create a repository in FOLDER/.thaw from the remote at URL. FOLDER is by default the URL's last part.

    With a model named, the repository remembers it. Credentials come from your environment."""
    from thaw.repo import remotes
    from thaw.repo.repository import open as open_at
    from thaw.repo.settings import remember
    from thaw.weights.folder import SCHEME

    del named  # a clone is always a repository of its own
    path = Path(folder or url.rstrip("/").rpartition("/")[2] or "clone").expanduser() / FOLDER
    wanted = engine_name is not None or model is not None
    stored = (model or "").startswith(SCHEME)
    chosen = boot.choose(None, engine_name, model, dtype, device) if wanted and not stored else None
    report = transfer.watched(
        "cloning",
        lambda meter: remotes.clone(
            url, path, transfer.read_options(pairs), remote=remote, branch=branch, single_branch=single_branch,
            namespace=place.namespace(), weights=weights, meter=meter, refs_only=refs_only,
            depth=depth,
        ),
    )  # fmt: skip
    if wanted:
        with open_at(path, create=False) as repo:
            remember(repo.store, chosen or boot.choose(repo.store, engine_name, model, dtype, device))
    if not as_json:
        output.line(f"cloned into {path.resolve()}")
    transfer.say(report, "fetched", as_json)
    if not as_json and chosen is None:
        _hint(path)


def _hint(path: Path) -> None:
    """Which model what was cloned was made with, and how to name it: as a set where the weights came too."""
    from thaw.core.identity import ModelIdentity
    from thaw.repo.repository import open as open_at
    from thaw.weights.folder import SCHEME
    from thaw.weights.record import ARCHITECTURE

    with open_at(path, create=False) as repo:
        models = [repo.store.get_as(model, ModelIdentity) for model in repo.store.models()]
        stored = {entry.weights: entry.name for entry in repo.weights.list()}
    models = [model for model in models if model.architecture != ARCHITECTURE]
    for model in models[:3]:
        sizes = [
            f"{what} {model.config[what]}" for what in ("num_hidden_layers", "hidden_size") if what in model.config
        ]
        output.note(f"captured with {', '.join([model.architecture, *sizes, model.dtype])}")
    here = next((stored[model.weights] for model in models if model.weights in stored), None)
    if here is None:
        output.note("name your copy of that model at the first run or fork: --model PATH")
    else:
        output.note(f"its weights are here; name them at the first run or fork: --model {SCHEME}{here}")
