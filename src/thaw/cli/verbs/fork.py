"""`thaw fork`: several children from one point, in one engine batch, a branch each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from thaw.cli import children, conversation, options, output, prompts, speak, view
from thaw.cli.progress import Progress
from thaw.repo.children import Child, branches_of, free_name, was_cut

if TYPE_CHECKING:
    from thaw.engines.base import Completion, Policy
    from thaw.repo.chat import ChatResult
    from thaw.repo.commit import CommitResult
    from thaw.repo.group import Group

EXAMPLE = """
thaw fork main "Why?" "How?" "Who?" --max-tokens 40
thaw fork main:turn=1 "Why?" -n 8 --name try
thaw fork main --prompts questions.jsonl --json
thaw fork origin/main "Why?" -n 4 --fetch
"""
DEFAULT_N = 4


@options.verb("fork", EXAMPLE)
@click.argument("point")
@click.argument("prompt", nargs=-1)
@click.option(
    "-n", "n", type=options.CHILDREN, metavar="N", help="Number of children; default: one per prompt, else 4."
)
@click.option("--prompts", "file", metavar="FILE.jsonl", help='One child per line: "text" or {"prompt": …, "seed": …}.')
@click.option(
    "--name", metavar="NAME", help="Name the branches NAME/0, NAME/1, …; default: fork, or the first free forkN."
)
@click.option("--replay", is_flag=True, help="Give children the parent's seed instead of their own.")
@click.option(
    "--fetch", is_flag=True, help="Fetch POINT, a remote's branch, first: origin/main. Loads while it downloads."
)
@click.option("--recompute", is_flag=True, help="Prefill again where the stored KV does not match or was not kept.")
@click.option("-m", "message", metavar="TEXT", help="The commits' message; default: the start of each prompt.")
@options.chat
@options.sampling
@options.engine
@options.as_json
def command(
    named: str | None,
    point: str,
    prompt: tuple[str, ...],
    n: int | None,
    file: str | None,
    name: str | None,
    chat: bool,
    replay: bool,
    fetch: bool,
    recompute: bool,
    message: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Fork POINT into several children: one load, one batch, one branch each.

    One PROMPT goes to all children, several go one to each. Without a prompt each child just continues. Every child
    has its own seed, derived from the parent's.
    """
    from thaw.repo.remotes import is_promised

    talk = conversation.taken(values, chat=chat)
    wanted = _children(prompt, n, file, options.given_sampling(values))
    if chat and not all(child.prompt for child in wanted):
        raise click.UsageError("--chat needs a prompt for every child.")
    with speak.opened(named, engine_name, model, dtype, device) as repo:
        fetch = fetch or is_promised(repo.store, point)
        where = point if fetch else repo.resolve(point)
        prefix = free_name(repo, name, len(wanted))
        repo.require_room(sum(child.sampling.max_tokens for child in wanted))
        with Progress("fetching and restoring the session" if fetch else "restoring the session"):
            policy: Policy = "recompute" if recompute else "exact"
            group = repo.fork(where, len(wanted), replay=replay, policy=policy, fetch=fetch)
        with group:
            results = _chat(group, wanted, talk, prefix, as_json) if chat else []
            completions = [r.completion for r in results] if chat else _generate(group, wanted, prefix, as_json)
            commits = _commit(group, wanted, prefix, message)
            _report(group, wanted, completions, commits, results, as_json)


def _children(prompt: tuple[str, ...], n: int | None, file: str | None, given: dict[str, Any]) -> list[Child]:
    if file is not None and prompt:
        raise click.UsageError("give prompts as arguments or with --prompts, not both.")
    lines = prompts.from_jsonl(file) if file is not None else [(text, {}) for text in prompt]
    if len(lines) <= 1 and file is None:
        lines = (lines or [("", {})]) * (n or DEFAULT_N)
    if n is not None and n != len(lines):
        raise click.UsageError(f"-n {n} does not match {len(lines)} prompts; leave out -n.")
    return [Child(text, prompts.make_sampling(given, own)) for text, own in lines]


def _chat(
    group: Group, wanted: list[Child], talk: conversation.ChatOptions, prefix: str, quiet: bool
) -> list[ChatResult]:
    """Each child's prompt is the user's next message."""
    new = [talk.messages(session, child.prompt) for session, child in zip(group, wanted, strict=True)]
    stream = group.chat_stream(new, [child.sampling for child in wanted], **talk.arguments)
    names = branches_of(prefix, wanted)
    results = children.follow(stream, names, quiet=quiet)
    for name, result in zip(names, results, strict=True):
        conversation.note(result, f"{name}: ")
    return results


def _generate(group: Group, wanted: list[Child], prefix: str, quiet: bool) -> list[Completion]:
    sampling = [child.sampling for child in wanted]
    if not any(child.prompt for child in wanted) and was_cut(group):
        stream = group.resume_stream()
    else:
        stream = group.stream([child.prompt for child in wanted], sampling)
    return children.follow(stream, branches_of(prefix, wanted), quiet=quiet)


def _commit(group: Group, wanted: list[Child], prefix: str, message: str | None) -> list[CommitResult]:
    done = []
    with Progress("committing"):
        for session, child, name in zip(group, wanted, branches_of(prefix, wanted), strict=True):
            text = message or output.one_line(child.prompt, 72) or "went on"
            done.append(session.commit(text, branch=name))
    return done


def _report(
    group: Group,
    wanted: list[Child],
    completions: list[Completion],
    commits: list[CommitResult],
    chats: list[ChatResult],
    as_json: bool,
) -> None:
    together = list(zip(group, wanted, completions, commits, strict=True))
    if as_json:
        said = [{"prompt": w.prompt, **speak.plain(done, c, s)} for s, w, c, done in together]
        for one, result in zip(said, chats, strict=False):
            one.update(conversation.plain(result))
        output.print_json({"children": said})
        return
    for _, child, completion, done in together:
        name = output.style(str(done.branch), "bold", "green")
        asked = f"  {output.one_line(child.prompt, 60)}" if child.prompt else ""
        output.line(f"{name} {view.commit_id(done.commit)}{asked}")
        view.block(completion.text)
        output.line(view.MARGIN + output.style(speak.spoken(completion).removeprefix("; "), "dim"))
        output.line()
    proof = group[0].proof
    if proof is not None:
        output.note(f"restored once for {len(group)}: {view.proof_line(proof)}")
