"""Whatever stands on the command line, it is no error inside thaw: every verb's arguments and options, with values that
no person writes."""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from thaw import cli
from thaw.cli import catalog, light
from thaw.core.errors import ThawError
from thaw.store import Store

from .conftest import Shell

BOOTS = {"up", "demo", "bench", "pool", "verify", "engine", "doctor", "serve"}
"""Verbs that start processes or measure; those of their options that are numbers are checked before."""
WRITERS = {"adopt", "branch", "tag", "undo", "run", "fork", "gc", "fsck"}
LONE = "\udcff"
"""What a byte that is no UTF-8 becomes in an argument."""
ODD = (
    "", " ", LONE, f"main{LONE}", "a\nb", "-1", "0", str(2**63 - 1), str(2**63), "9" * 400, "nan", "inf", "-inf",
    "1e308", "1e-320", "[" * 200_000, "[1e999]", '["\\ud800"]', '"\\ud800"', "x" * 100_000, "main~999999",
    "main@{999999}", "main:999999999", "/dev/null", "a/\n/x", "=", "a=" + "[" * 200_000,
)  # fmt: skip


def commands() -> Iterator[tuple[str, tuple[str, ...], click.Command]]:
    """(its name, the words before its own, the command) of every verb and of what stands below one."""
    for verb in catalog.VERBS:
        found = importlib.import_module(f"thaw.cli.verbs.{verb}").command
        command = found.command() if isinstance(found, light.Light) else found
        yield verb, (verb,), command
        if isinstance(command, click.Group):
            with click.Context(command) as context:
                for name in command.list_commands(context):
                    below = command.get_command(context, name)
                    assert below is not None
                    yield f"{verb} {name}", (verb, name), below


def lines(command: click.Command, folder: Path) -> Iterator[list[str]]:
    """Command lines of a verb: one of its arguments or options odd, and one argument where it needs some."""
    deep = folder / "deep.json"
    deep.write_text("[" * 200_000, encoding="utf-8")
    for value in (*ODD, str(deep), str(folder)):
        for param in command.params:
            if isinstance(param, click.Argument):
                yield [value]
                yield ["main", value]
            elif isinstance(param, click.Option) and not param.is_flag:
                yield [param.opts[-1], value]
                yield ["main", param.opts[-1], value]


COMMANDS = {name: (words, command) for name, words, command in commands()}
QUICK = [name for name, (words, _) in COMMANDS.items() if words[0] not in BOOTS]
FEW = {"run": ["--max-tokens", "1"], "fork": ["--max-tokens", "1"]}
"""For those that generate."""


@pytest.mark.slow("some 300 command lines of every verb, and some boot the fake engine")
@pytest.mark.parametrize("name", QUICK)
def test_no_odd_value_is_an_error_inside_thaw(name: str, tree: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    words, command = COMMANDS[name]
    here, kept = tree.cwd / ".thaw", tree.cwd / "kept"
    with Store.open(here) as store:
        store.set_setting("engine", '{"name": "fake", "options": {"max_model_len": 1000}}')
    shutil.copytree(here, kept)
    monkeypatch.chdir(tree.cwd)
    monkeypatch.delenv("THAW_DEBUG", raising=False)
    for i, line in enumerate(lines(command, tree.cwd)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        json = ["--json"] if i % 2 else []
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([*words, *json, *FEW.get(name, []), *line])
        said = [word[:60] for word in line]
        assert code in range(9), (said, code, out.getvalue()[-600:], err.getvalue()[-600:])
        if code == 0 and words[0] in WRITERS:
            shutil.rmtree(here)
            shutil.copytree(kept, here)


@pytest.mark.slow("some 300 command lines of every verb")
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in QUICK])
def test_an_odd_value_is_taken_or_refused_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THAW_API_KEY", "")  # --api-key sets it
    _, command = COMMANDS[name]
    with click.Context(click.Group("thaw")) as above:
        for line in lines(command, tmp_path):
            with contextlib.suppress(click.ClickException, click.exceptions.Exit, ThawError):
                command.make_context(name, [*line], parent=above)


def test_what_is_no_text_is_named(tree: Shell) -> None:
    for words in (["reflog", LONE], ["undo", LONE], ["branch", f"a{LONE}"], ["run", LONE], ["match", "--tokens", LONE]):
        result = tree(*words)
        assert result.code == 2 and f"argument {len(words)} is not UTF-8 text" in result.err
        assert tree(*words, "--json").json()["error"]["kind"] == "usage"


def test_a_config_that_cannot_be_looked_at_is_named(shell: Shell) -> None:
    result = shell("doctor", "--quick", "--config", "x" * 5000)
    assert result.code == 2 and "there is no config xxx" in result.err and len(result.err) < 400


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e308", "-1"])
def test_gc_keeps_a_number_of_days(tree: Shell, value: str) -> None:
    assert tree("gc", "--keep-days", value).code == 2


def test_a_deep_file_of_prompts_is_named_with_its_line(tree: Shell) -> None:
    (tree.cwd / "deep.jsonl").write_text('"sound"\n' + "[" * 200_000, encoding="utf-8")
    result = tree("fork", "main", "--prompts", "deep.jsonl")
    assert result.code == 2 and "deep.jsonl, line 2" in result.err


def test_an_option_that_the_engine_has_not_is_refused_by_name(tree: Shell) -> None:
    result = tree("run", "x", "--dtype", "float16")
    assert result.code == 2 and "engine fake" in result.err and "'dtype'" in result.err


def test_a_model_is_not_ignored_where_the_engine_that_is_remembered_loads_none(tree: Shell) -> None:
    before = tree.commit("main")
    result = tree("run", "x", "--model", "/models/some")
    assert result.code == 2 and "--engine" in result.err and "/models/some" in result.err
    assert tree.commit("main") == before
