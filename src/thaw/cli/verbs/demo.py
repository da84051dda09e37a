"""`thaw demo`: the story of thaw, told with a real model and measured as it goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thaw.cli import boot, options, output
from thaw.core.errors import LawBroken

if TYPE_CHECKING:
    from thaw.demo.story import DemoOptions, Story

EXAMPLE = """
thaw demo
thaw demo --model ~/models/Qwen3-0.6B --out my-demo
"""


@options.verb("demo", EXAMPLE)
@click.option(
    "--out", metavar="FOLDER", help="Folder for the repository and receipt; default: thaw-demo, or thaw-demo-N."
)
@click.option("--force", is_flag=True, help="Replace an earlier demo in that folder.")
@click.option("--engine", "engine_name", default="transformers", show_default=True, metavar="NAME")
@click.option("--model", metavar="PATH", help="Your own model; default: THAW_MODEL, or a small one that is downloaded.")
@click.option("--max-tokens", type=click.IntRange(1, 1000), default=40, show_default=True, metavar="N")
@options.as_json
def command(
    named: str | None, out: str | None, force: bool, engine_name: str, model: str | None, max_tokens: int, as_json: bool
) -> int:
    """Watch a model read a document once and a fresh process continue from the snapshot four times.

    Leaves a repository to explore and a receipt with every figure. The exit code is 7 if a promised check failed.
    """
    from thaw.demo.story import DemoOptions

    del named  # the demo makes its own repository
    boot.hush()
    wanted = DemoOptions(
        out=Path(out) if out else None, force=force, engine=engine_name, model=model, max_tokens=max_tokens
    )
    story = _tell(wanted, as_json)
    return 0 if story.ok else LawBroken.exit_code


def _tell(wanted: DemoOptions, as_json: bool) -> Story:
    from thaw.cli.story import Narrator, ending, proof
    from thaw.demo.run import run

    narrator = Narrator(quiet=as_json)
    try:
        story = run(wanted, narrator, _step)
    finally:
        narrator.close()
    if as_json:
        plain = {name: getattr(story, name) for name in story.__struct_fields__}
        ratio = story.prefill_first_token_s / story.hydrate_first_token_s
        output.print_json({"ok": story.ok, **plain, "sooner": ratio if story.ok else None})
    else:
        proof(narrator, story)
        ending(narrator, story)
    return story


def _step(line: str) -> None:
    sys.stdout.flush()
    output.note(f"· {line}")
