"""`thaw pool run` and `thaw pool status`: a round of branches in a pool of engines, and the pools of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from thaw.cli import boot, options, output, place, prompts, view, words
from thaw.cli.progress import Progress
from thaw.core.errors import NotFound

if TYPE_CHECKING:
    from thaw.pool import Branch, BranchResult, ForkPool
    from thaw.pool.status import PoolStatus

EXAMPLE = """
thaw pool run main "Why?" "How?" "Who?" --workers 2 --max-tokens 40
thaw pool run main -n 16 --policy fast --json
thaw pool status
"""


@click.group("pool", epilog="\b\nExample:\n" + "\n".join(f"  {line}" for line in EXAMPLE.strip().splitlines()))
def command() -> None:
    """Run branches in a pool of engines; list pools."""


@options.verb("run", EXAMPLE)
@click.argument("point")
@click.argument("prompt", nargs=-1)
@click.option(
    "-n", "n", type=options.CHILDREN, metavar="N", help="Number of branches; default: one per prompt, else 4."
)
@click.option(
    "--prompts", "file", metavar="FILE.jsonl", help='One branch per line: "text" or {"prompt": …, "seed": …}.'
)
@click.option("--workers", type=options.CHILDREN, default=1, show_default=True, metavar="N",
              help="Number of engines to boot.")  # fmt: skip
@click.option("--attach", "urls", multiple=True, metavar="URL", help="Join this running engine instead; repeatable.")
@click.option("--spread", type=options.CHILDREN, default=1, show_default=True, metavar="N",
              help="Number of workers to spread the branches over.")  # fmt: skip
@click.option("--policy", type=click.Choice(["exact", "fast"]), default="exact", show_default=True,
              help="fast: prefill again where that is expected to be faster.")  # fmt: skip
@click.option(
    "--timeout",
    "timeout_s",
    type=options.Number(min=0, min_open=True),
    metavar="S",
    help="Stop each branch after S seconds.",
)
@click.option("--name", metavar="NAME", help="Commit the results as branches NAME/0, NAME/1, …")
@click.option("--arena", type=options.num_bytes, default="4GiB", show_default=True, metavar="BYTES",
              help="Shared memory for snapshots.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Set an engine option; repeatable.")
@options.sampling
@options.engine
@options.as_json
def run(
    named: str | None,
    point: str,
    prompt: tuple[str, ...],
    n: int | None,
    file: str | None,
    workers: int,
    urls: tuple[str, ...],
    spread: int,
    policy: Any,
    timeout_s: float | None,
    name: str | None,
    arena: int,
    settings: tuple[str, ...],
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
    **values: Any,
) -> int:
    """Run one round of branches from POINT: boot or join engines, generate, and print each result and where it ran.

    One PROMPT goes to all branches, several go one to each. Without a prompt each branch just continues. Nothing is
    committed without --name. The exit code is 8 if a branch failed; the other results are still printed.
    """
    from thaw.pool import ForkPool

    wanted = branches(prompt, n, file, options.given_sampling(values))
    boot.hush()
    with place.open_repository(named) as repo:
        where = repo.resolve(point)
        chosen = boot.choose(repo.store, engine_name, model, dtype, device) if not urls else None
        engine: Any = list(urls) if chosen is None else chosen.name
        more = {} if chosen is None else {**chosen.options, **engine_settings(settings)}
        if boot.URL in more:
            engine, more = [more[boot.URL]], {}
        with Progress("booting the pool"):
            pool = ForkPool(engine, workers=workers, repo=repo, arena_nbytes=arena, policy=policy, **more)
        with pool:
            with Progress(f"running {words.count(len(wanted), 'branch', 'branches')}"):
                results = pool.fork(
                    where, wanted, spread=spread, timeout_s=timeout_s, keep=name is not None, errors="return"
                )
            commits = _commit(results, name)
            _report(pool, wanted, results, commits, as_json)
    return 0 if all(result.ok for result in results) else 8


def branches(prompt: tuple[str, ...], n: int | None, file: str | None, given: dict[str, Any]) -> list[Branch]:
    """What each branch is asked, and how it samples."""
    from thaw.pool import Branch

    if file is not None and prompt:
        raise click.UsageError("give prompts as arguments or with --prompts, not both.")
    lines = prompts.from_jsonl(file) if file is not None else [(text, {}) for text in prompt]
    if len(lines) <= 1 and file is None:
        lines = (lines or [("", {})]) * (n or 4)
    if n is not None and n != len(lines):
        raise click.UsageError(f"-n {n} does not match {len(lines)} prompts; leave out -n.")
    return [Branch(prompt=text, sampling=prompts.make_sampling(given, own)) for text, own in lines]


def engine_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`name=value` as options: JSON where it is, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier():
            raise click.BadParameter(f"--set {pair}: write NAME=VALUE, for example --set max_model_len=4096")
        try:
            found[name] = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            found[name] = value
    return found


def _commit(results: list[BranchResult], name: str | None) -> dict[int, Any]:
    if name is None:
        return {}
    with Progress("committing"):
        return {
            r.index: r.session.commit(output.one_line(r.text, 72) or "went on", branch=f"{name}/{r.index}")
            for r in results
            if r.session is not None
        }


def _report(
    pool: ForkPool, wanted: list[Branch], results: list[BranchResult], commits: dict[int, Any], as_json: bool
) -> None:
    stats = pool.stats()
    if as_json:
        rows = [plain(asked, result, commits.get(result.index)) for asked, result in zip(wanted, results, strict=True)]
        output.print_json({"branches": rows, "pool": stats})
        return
    for asked, result in zip(wanted, results, strict=True):
        title = output.style(f"{result.index}", "bold", "green" if result.ok else "red")
        done = commits.get(result.index)
        stored = f" {done.branch} {view.commit_id(done.commit)}" if done is not None else ""
        output.line(f"{title}{stored}  {output.one_line(asked.prompt, 60)}".rstrip())
        view.block(result.text)
        output.line(view.MARGIN + output.style(_how(result), "dim"))
        output.line()
    booted = ", ".join(f"{worker.name} {words.seconds(worker.boot_s)}" for worker in stats.workers)
    output.note(f"booted: {booted}; arena {words.nbytes(stats.arena.nbytes)}")


def _how(result: BranchResult) -> str:
    """Where it ran, how the point came there, and how long it took."""
    if result.error is not None:
        return f"{result.error.kind}: {result.error}"
    decision, times = result.decision, result.timings
    assert decision is not None
    came = f"{decision.action} from {decision.tier}" if decision.action == "hydrate" else decision.action
    again = f", attempt {result.attempts}" if result.attempts > 1 else ""
    return (
        f"{result.worker}{again}: {came} in {words.seconds(decision.measured_s)}, "
        f"{words.count(result.num_cached_tokens, 'token')} cached, first token {words.seconds(times.ttft_s)}, "
        f"all in {words.seconds(times.total_s)}"
    )


def plain(asked: Branch, result: BranchResult, done: Any) -> dict[str, Any]:
    """A result for JSON."""
    return {
        "index": result.index, "prompt": asked.prompt, "text": result.text, "token_ids": result.token_ids,
        "logprobs": result.logprobs, "finish_reason": result.finish_reason, "seed": str(result.seed),
        "worker": result.worker, "attempts": result.attempts, "usage": result.usage, "proof": result.proof,
        "restore": result.restore, "decision": result.decision, "timings": result.timings,
        "commit": None if done is None else done.commit, "branch": None if done is None else done.branch,
        "error": None if result.error is None else {"kind": result.error.kind, "message": str(result.error)},
    }  # fmt: skip


@options.verb("status", "thaw pool status --json")
@options.as_json
def status(named: str | None, as_json: bool) -> None:
    """List this user's pools on this machine: workers, running and waiting branches, arena bytes. Asks no engine."""
    from thaw.pool.status import pools

    del named
    found = pools()
    if as_json:
        output.print_json({"pools": found})
        return
    if not found:
        raise NotFound("no pool is running here. A pool lives as long as the program that created it (thaw.ForkPool).")
    for one in found:
        _show(one)


def _show(found: PoolStatus) -> None:
    stats = found.stats
    title = output.style(f"pool of process {found.pid}", "bold")
    output.line(f"{title}  {found.engine} {found.model}, since {words.age(found.began_ns)}")
    output.rows(
        [
            (w.name, w.state, f"{w.running} running", words.count(w.resident_points, "point"), f"{w.num_failures} died")
            for w in stats.workers
        ],
        indent=view.MARGIN,
    )
    arena = stats.arena
    output.line(
        f"{view.MARGIN}{stats.running} running, {stats.waiting} waiting, {words.count(stats.num_rounds, 'round')}; "
        f"arena {words.nbytes(arena.nbytes)} of {words.nbytes(arena.limit_nbytes)}, "
        f"{words.nbytes(arena.spilled_nbytes)} spilled"
    )


command.add_command(run)
command.add_command(status)
