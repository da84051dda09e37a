"""`thaw receipt verify`: check measured records."""

from __future__ import annotations

import click

from thaw.cli import options, output, prompts
from thaw.core.errors import ThawError

EXAMPLE = """
thaw receipt verify receipts/*.json
"""


@click.group("receipt", epilog="\b\nExample:\n  thaw receipt verify receipts/*.json")
def command() -> None:
    """Check receipts: records of measurements."""


@options.verb("verify", EXAMPLE)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@options.as_json
def verify(named: str | None, files: tuple[str, ...], as_json: bool) -> int:
    """Check receipts: schema, arithmetic, hashes. The exit code is 7 if one fails."""
    found = {name: _problems(name) for name in files}
    ok = not any(found.values())
    if as_json:
        listed = [{"file": name, "ok": not problems, "problems": problems} for name, problems in found.items()]
        output.print_json({"ok": ok, "receipts": listed})
    else:
        for name, problems in found.items():
            mark = output.style("FAILED", "bold", "red") if problems else output.style("holds ", "green")
            output.line(f"{mark}  {name}")
            for problem in problems:
                output.line(f"        {problem}")
    return 0 if ok else 7


def _problems(name: str) -> list[str]:
    """What is wrong with the receipt in a file. A file that is no receipt is one problem, and stops nothing."""
    from thaw.receipt import verify as check
    from thaw.receipt.format import MAX_BYTES

    try:
        return list(check(prompts.bytes_of(name, MAX_BYTES)).problems)
    except ThawError as error:
        return [str(error)]


command.add_command(verify)
