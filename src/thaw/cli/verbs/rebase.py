"""`thaw rebase`: a point under other weights, and how far each token's log probability has moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from thaw.cli import options, output, speak, words
from thaw.cli.progress import Progress

if TYPE_CHECKING:
    from thaw.engines.base import Codec
    from thaw.repo.rebase import Rebase, TokenDrift

EXAMPLE = """
thaw rebase main --model checkpoints/step-200
thaw rebase main --model checkpoints/step-200 --branch step-200 --json
"""
DEFAULT_ROWS = 10


@options.verb("rebase", EXAMPLE)
@click.argument("point", default="HEAD")
@click.option("--branch", metavar="NAME", help="Also keep the session under the new weights, as a new branch.")
@click.option("-m", "message", metavar="TEXT", default="", help="The branch's commit message.")
@click.option("--rows", type=click.IntRange(0, 1 << 20), default=DEFAULT_ROWS, show_default=True, metavar="N",
              help="Tokens to list: those that moved most.")  # fmt: skip
@options.engine
@options.as_json
def command(
    named: str | None,
    point: str,
    branch: str | None,
    message: str,
    rows: int,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Replay POINT under the engine's weights and show the drift, token by token. Default: HEAD.

    Each sampled token is decoded again. The table has its stored log probability, the new one, and the margin by which
    the likeliest token now leads. With --branch the tokens are also prefilled under the new weights and
    kept; the session continues from there.
    """
    with speak.opened(named, engine_name, model, dtype, device) as repo:
        with Progress("replaying"):
            found = repo.rebase(point, branch=branch, message=message)
        codec = repo.engine.codec
    if as_json:
        output.print_json(plain(found))
    else:
        _print(found, codec, rows)


def plain(found: Rebase) -> dict[str, Any]:
    import msgspec

    told: dict[str, Any] = msgspec.to_builtins(found)
    drifts = [{**one, "drift": token.drift} for one, token in zip(told.pop("drifts"), found.drifts, strict=True)]
    return {**told, "mean_drift": found.mean, "largest_drift": found.largest, "num_not_best": found.num_not_best,
            "tokens": drifts}  # fmt: skip


def _print(found: Rebase, codec: Codec, rows: int) -> None:
    output.line(f"{output.style(found.point, 'yellow')}  {words.count(len(found.drifts), 'sampled token')} of "
                f"{found.num_tokens:,}; the model differs in: {found.changed or 'nothing'}")  # fmt: skip
    moved = sorted(found.drifts, key=lambda one: -abs(float("inf") if one.drift is None else one.drift))[:rows]
    if moved:
        head = ("token", "text", "stored", "now", "drift", "margin")
        output.rows([head, *(_row(one, codec) for one in sorted(moved, key=lambda one: one.position))])
    output.line(f"mean drift {found.mean:+.4f}, largest {found.largest:.4f} nats; "
                f"{found.num_not_best:,} tokens are not the likeliest now")  # fmt: skip
    if found.branch is not None:
        output.line(f"{output.style(found.branch, 'bold', 'green')} {str(found.commit)[3:15]}")


def _row(one: TokenDrift, codec: Codec) -> tuple[str, ...]:
    text = output.one_line(codec.decode([one.token_id], skip_special_tokens=False), 16)
    if one.now is None or one.drift is None or one.margin is None:
        return (str(one.position), repr(text), f"{one.stored:.4f}", "< -100", "", "")
    return (str(one.position), repr(text), f"{one.stored:.4f}", f"{one.now:.4f}", f"{one.drift:+.4f}",
            f"{one.margin:.4f}")  # fmt: skip
