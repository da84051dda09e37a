"""`thaw verify`: hydrate in a fresh process and say which laws held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thaw.cli import boot, options, output, view, words
from thaw.cli.place import open_repository
from thaw.cli.progress import Progress
from thaw.core.errors import LawBroken

if TYPE_CHECKING:
    from thaw.repo.report import Continuation, LawResult, VerifyReport

EXAMPLE = """
thaw verify main
thaw verify fork/2 --tokens 0 --json
"""
NUMBER = {"bytes": "1", "boundary": "2", "state": "3", "identity": "5", "cached": "6"}
MARKS = {True: ("held", "green"), False: ("FAILED", "red"), None: ("-", "yellow")}


@options.verb("verify", EXAMPLE)
@click.argument("point", default="HEAD")
@click.option(
    "--tokens", type=click.IntRange(0, 1 << 31), default=16, metavar="N", help="Compare N greedy tokens (16)."
)
@options.engine
@options.as_json
def command(
    named: str | None,
    point: str,
    tokens: int,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Hydrate POINT (default: HEAD) in a fresh process and report which laws held.

    It hashes every blob, asks the engine for its count of cached tokens, compares the logits at the point with those
    at capture, and compares a continuation with one that was prefilled again. The exit code is 7 if a law failed.
    """
    boot.hush()
    with open_repository(named) as repo:
        chosen = boot.choose(repo.store, engine_name, model, dtype, device)
        with Progress(f"verifying {point} in a fresh process"):
            report = repo.verify(point, engine=chosen, num_tokens=tokens)
    if as_json:
        fields = {name: getattr(report, name) for name in report.__struct_fields__}
        output.print_json({"ok": report.ok, **fields})
    else:
        _print(report)
    return 0 if report.ok else LawBroken.exit_code


def _print(report: VerifyReport) -> None:
    where = "a fresh process" if report.fresh_process else "this process"
    output.line(
        f"{output.style(report.point, 'yellow')}  {words.count(report.num_tokens, 'token')}, KV of {report.num_kv:,}"
    )
    if report.kv_ranges:
        output.line(f"KV of {view.kv_by_policy(report.kv_ranges)}, taken as it is")
    output.line(f"hydrated in {where} by {report.engine} {report.engine_version} on {report.device}")
    output.line()
    for law in sorted(report.laws, key=lambda law: NUMBER.get(law.name, "?")):
        _law(law)
    if report.continuation is not None:
        output.line()
        _continuation(report.continuation)
    output.line()
    verdict = "every promised law held" if report.ok else "a law FAILED: do not continue from this point"
    output.line(output.style(verdict, "bold", "green" if report.ok else "red"))


def _law(law: LawResult) -> None:
    mark, colour = MARKS[law.held]
    head = f"law {NUMBER.get(law.name, '?')}  {law.name.ljust(9)}"
    output.line(f"{output.style(head, 'bold')} {output.style(mark.ljust(6), colour)}  {law.seen or law.detail}")
    if law.promised:
        view.block(f"promised: {law.promised}", indent=" " * 25)
    if law.held is False and law.detail:
        view.block(law.detail, indent=" " * 25)


def _continuation(found: Continuation) -> None:
    output.line(
        f"{words.count(found.num_tokens, 'greedy token')} compared with prefilling again (information, not a law):"
    )
    if found.first_difference is None:
        output.line("  the same tokens")
    else:
        output.line(f"  token {found.first_difference} is the first to differ")
    output.line(f"  log probabilities differ by at most {found.max_logprob_difference:.3g}")
    times = f"first token after {words.seconds(found.hydrate_s)}, prefilling again {words.seconds(found.prefill_s)}"
    output.line(f"  {times}")
