"""What holds for every verb: exit codes, errors, JSON, colour, help, what is loaded, the reference page."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thaw.cli import catalog, reference
from thaw.core.errors import ThawError

from .conftest import SOURCE, Shell

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "rich", "asyncio", "email", "thaw.engines.fake")
READERS = (["--help"], ["log"], ["log", "--graph", "--all"], ["show"], ["branch"], ["tag"], ["diff", "fork/0"])


@pytest.mark.parametrize("verb", catalog.VERBS)
def test_every_verb_has_help_with_an_example(shell: Shell, verb: str) -> None:
    text = shell.ok(verb, "--help").out
    assert "Example:" in text
    assert "  thaw " in text


def test_the_list_of_verbs_says_what_their_own_help_says() -> None:
    import click

    from thaw.cli.group import thaw

    for verb, text in catalog.VERBS.items():
        command = thaw.get_command(click.Context(thaw), verb)
        assert command is not None and command.name == verb
        assert command.help
        assert text.endswith(".")


@pytest.mark.parametrize("words", READERS, ids=" ".join)
def test_verbs_that_only_look_load_nothing_heavy(tree: Shell, words: list[str]) -> None:
    """Why they take under 100 ms; the time itself is printed (`pytest -s`), not asserted."""
    code = (
        "import sys; from thaw.cli import main; code = main(sys.argv[1:]); "
        "print(*sorted(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-S", "-c", code, *words]
    site = subprocess.run(
        [sys.executable, "-c", "import sys, os; print(os.pathsep.join(p for p in sys.path if p))"],
        capture_output=True, text=True, env=environment, check=True,
    ).stdout.strip()  # fmt: skip
    environment["PYTHONPATH"] = site
    started = time.perf_counter()
    done = subprocess.run(command, cwd=tree.cwd, env=environment, capture_output=True, text=True, timeout=60)
    print(f"thaw {' '.join(words)}: {(time.perf_counter() - started) * 1e3:.0f} ms whole process")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert not [name for name in HEAVY if name in loaded]


def test_reading_verbs_make_no_engine_even_if_it_is_gone(tree: Shell) -> None:
    from thaw.store import Store

    with Store.open(tree.cwd / ".thaw") as store:
        store.set_setting("engine", '{"name": "no-such-engine", "options": {}}')
    for words in (["log"], ["show"], ["branch"], ["diff", "fork/0", "fork/1"], ["match", "--tokens", "[97]"]):
        tree.ok(*words)
    gone = tree("run", "x")
    assert gone.code == 2
    assert "no-such-engine" in gone.err


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["show", "nothing"], 2, "not-found"),
        (["show", "main..x"], 2, "bad-point"),
        (["show", "main:token=99999"], 2, "not-found"),
        (["branch", "main", "main"], 4, "ref-conflict"),
        (["run", "x", "--temperature", "-1"], 2, "bad-sampling"),
        (["run", "x", "--engine", "none"], 2, "not-found"),
        (["run", "--file", "nothing.txt"], 2, "not-found"),
        (["fork", "main", "x", "-n", "0"], 2, "usage"),
        (["log", "--no-such-option"], 2, "usage"),
        (["init"], 4, "conflict"),
        (["no-such-verb"], 2, "usage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_errors_have_a_kind_a_message_and_a_code(tree: Shell, words: list[str], code: int, kind: str) -> None:
    said = tree(*words, "--json")
    assert said.code == code
    assert said.err == ""
    error = said.json()["error"]
    assert error["kind"] == kind
    assert error["message"]
    plain = tree(*words)
    assert (plain.code, plain.out) == (code, "")
    assert plain.err.startswith("thaw: ")
    assert "Traceback" not in plain.err


def test_exit_codes_in_the_reference_are_those_of_the_errors() -> None:
    codes = {str(found.exit_code) for found in _tree(ThawError)} - {"1"}
    assert all(f"| {code} |" in reference.HEAD for code in codes)


def _tree(error: type[ThawError]) -> set[type[ThawError]]:
    return {error}.union(*(_tree(child) for child in error.__subclasses__() if child.__module__ == "thaw.core.errors"))


def test_another_model_is_refused_with_the_way_out(tree: Shell) -> None:
    from thaw.store import Store

    with Store.open(tree.cwd / ".thaw") as store:
        store.set_setting("engine", '{"name": "fake", "options": {"seed": 1}}')
    refused = tree("run", "x", "--max-tokens", "2", "--json")
    assert refused.code == 3
    assert refused.json()["error"]["kind"] == "identity-mismatch"
    assert "--recompute" in refused.json()["error"]["message"]
    done = tree.ok("run", "x", "--max-tokens", "2", "--recompute", "--json").json()
    assert done["proof"]["num_recomputed_tokens"] > 0


def test_an_error_inside_thaw_is_short_and_says_how_to_see_more(tree: Shell) -> None:
    broken = "import thaw.repo.repository as r; r.Repository.log = lambda *a, **k: 1 / 0\n"
    (tree.cwd / "sitecustomize.py").write_text("")
    code = f"{broken}from thaw.cli import main; raise SystemExit(main(['log']))"
    for debug in ("", "1"):
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "THAW_DEBUG": debug}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tree.cwd, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 70
        assert "THAW_DEBUG=1" in done.stderr
        assert ("Traceback" in done.stderr) == bool(debug)


def test_a_reader_that_leaves_is_no_error(tree: Shell) -> None:
    command = f"{sys.executable} -m thaw.cli log --all --json | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, shell=True, cwd=tree.cwd, env=environment, capture_output=True, text=True)  # noqa: S602
    assert done.stderr == ""


def test_unknown_verbs_are_guessed(shell: Shell) -> None:
    assert "did you mean branch" in shell("brnach").err


def test_version(shell: Shell) -> None:
    from thaw import __version__

    assert shell.ok("--version").out == f"thaw {__version__}\n"


def test_model_text_cannot_write_escape_sequences_to_a_terminal(repo: Shell) -> None:
    repo.ok("run", "red \x1b[31m and \u202e turned", "--no-generate")
    out = on_a_terminal(repo, ["show"])
    assert "\x1b[31m" not in out
    assert "\u202e" not in out


@pytest.mark.parametrize(("environment", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_that_want_it(tree: Shell, environment: dict[str, str], colour: bool) -> None:
    assert ("\x1b[33m" in on_a_terminal(tree, ["log"], **environment)) is colour


def test_fork_on_a_terminal_draws_and_leaves_only_the_result(tree: Shell) -> None:
    out = on_a_terminal(tree, ["fork", "main", "Why?", "-n", "2", "--max-tokens", "30"])
    assert "fork2/0" in out
    assert "restored once for 2" in out


def test_interrupting_a_generation_commits_what_it_had(repo: Shell) -> None:
    from thaw.store import Store

    with Store.open(repo.cwd / ".thaw") as store:
        store.set_setting("engine", '{"name": "fake", "options": {"step_s": 0.05}}')
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "thaw.cli", "run", "hello", "--max-tokens", "2000", "--ignore-eos"],
        cwd=repo.cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a shell's background job ignores it
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    said = repo.ok("show", "--json").json()
    assert said["turns"][-1]["finish_reason"] == "abort"
    assert 3 <= said["turns"][-1]["end"] - said["turns"][-1]["start"] < 2000
    repo.ok("run", "and on", "--max-tokens", "3")


@pytest.mark.slow("work that is long enough to be told of")
def test_long_work_says_so_on_stderr_and_never_on_stdout(repo: Shell) -> None:
    from thaw.store import Store

    with Store.open(repo.cwd / ".thaw") as store:
        store.set_setting("engine", '{"name": "fake", "options": {"step_s": 0.1}}')
    done = repo.ok("run", "hello", "--max-tokens", "25", "--ignore-eos", "--json")
    assert done.json()["finish_reason"] == "length"
    assert "· generating" in done.err


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == reference.page(), "python -m thaw.cli.reference writes it"


def on_a_terminal(shell: Shell, words: list[str], **environment: str) -> str:
    """What a command writes to a terminal of 100 columns."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLUMNS")}
    env = {"TERM": "xterm-256color", **kept, "PYTHONPATH": str(SOURCE), "PYTHONUTF8": "1", **environment}
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "thaw.cli", *words], cwd=shell.cwd, env=env, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    out = b""
    while True:
        ready, _, _ = select.select([master], [], [], 60)
        try:
            data = os.read(master, 65536) if ready else b""
        except OSError:
            data = b""
        if not data:
            break
        out += data
    os.close(master)
    assert process.wait(timeout=60) == 0, out.decode(errors="replace")
    return out.decode(errors="replace")


def test_what_is_no_plain_file_is_written_into_and_stays_what_it_is(tree: Shell, tmp_path: Path) -> None:
    """A page for a pipe, or for a device: replacing that by a file would harm whoever uses it next."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target.html"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        tree.ok("show", "--html", str(pipe))
        assert reader.stdout is not None and reader.stdout.read().startswith(b"<!doctype html>")
    assert pipe.is_fifo()
    target.write_text("old")
    link.symlink_to(target)
    tree.ok("show", "--html", str(link))
    assert link.is_symlink() and target.read_bytes().startswith(b"<!doctype html>")
    tree.ok("engine", "config", "vllm", "--out", str(link.rename(tmp_path / "link.yaml")), "--force")
    assert (tmp_path / "link.yaml").is_symlink() and "kv_connector" in target.read_text()
    tree.ok("show", "--html", str(tmp_path / "new.html"))
    assert (tmp_path / "new.html").stat().st_mode & 0o777 == 0o600
