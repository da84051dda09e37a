"""`thaw forget`: delete branches of a remote with all that they alone reach."""

from __future__ import annotations

import click

from thaw.cli import options, output, place, words
from thaw.cli.progress import Progress

EXAMPLE = """
thaw forget --remote origin fork/0 fork/1
"""
VERSIONS = {
    "kept": "The bucket keeps older versions: what was deleted stays there until its own rules remove it.",
    "unknown": "The store does not say whether the bucket keeps older versions; look at its settings.",
}


@options.verb("forget", EXAMPLE)
@click.argument("names", nargs=-1, required=True, metavar="BRANCH...")
@click.option("--remote", metavar="NAME", required=True, help="The remote in which they are forgotten.")
@options.as_json
def command(named: str | None, names: tuple[str, ...], remote: str, as_json: bool) -> None:
    """Delete branches or tags of a remote with all that they alone reach: KV, tokens, history.

    It happens at once, without gc's grace period. Packs that hold other data too are rewritten, and reflog entries
    go. Branches that were deleted earlier can be forgotten too. What is in this repository stays: see `thaw branch -d`
    and `thaw gc --keep-days 0`."""
    with place.open_repository(named) as repo, Progress("forgetting"):
        report = repo.forget_remote(*names, remote=remote)
    if as_json:
        output.print_json(report)
        return
    output.line(
        f"forgot {', '.join(report.names)} in {report.remote}: {words.count(report.num_commits, 'commit')}, "
        f"{words.count(report.num_deleted, 'object')} deleted ({words.nbytes(report.deleted_nbytes)})"
    )
    if report.num_rewritten_packs:
        output.note(f"{words.count(report.num_rewritten_packs, 'pack')} rewritten")
    if report.old_versions in VERSIONS:
        output.note(VERSIONS[report.old_versions])
