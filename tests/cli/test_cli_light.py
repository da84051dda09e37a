"""Verbs that only read: what they load, and that they understand their words as click does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thaw.cli import catalog, light

from .conftest import SOURCE, Shell

NEVER = {
    "click", "rich", "dataclasses", "ctypes", "gettext", "argparse", "logging", "socket", "subprocess", "shutil",
    "urllib.request", "asyncio", "multiprocessing", "importlib.metadata", "thaw.engines.base", "thaw.engines.registry",
    "thaw.data.writer", "thaw.data.reader", "thaw.store.links", "thaw.store.transaction", "thaw.store.gc",
    "thaw.repo.session", "thaw.pool", "thaw.aio",
}  # fmt: skip
"""What no verb that only reads may load."""
MAY: dict[tuple[str, ...], set[str]] = {
    ("log",): set(),
    ("log", "--graph", "--all"): {"thaw.cli.graph"},
    ("show",): {"thaw.repo.show", "thaw.engines.text"},
    ("diff", "fork/0", "fork/1"): {"thaw.repo.diff"},
    ("branch",): set(),
    ("tag",): set(),
    ("reflog",): set(),
    ("stats",): {"thaw.repo.stats", "thaw.pool"},
}
"""Each verb, with what it alone may load of these."""
SHARED = set().union(*MAY.values())
MOST = 66
"""Modules of thaw that a verb which only reads may load (62 when this was written). What a command takes, against
`python -c pass`, is for `python -m thaw.bench.startup` to measure: on a busy machine a test of it fails by chance."""
LOADED = """
import json, sys
from thaw.cli import main
code = main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def loaded_by(folder: Path, words: Sequence[str]) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words],
        cwd=folder, env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("words", MAY, ids=" ".join)
def test_a_verb_that_reads_loads_what_it_uses(tree: Shell, words: tuple[str, ...]) -> None:
    loaded = loaded_by(tree.cwd, words)
    assert sorted(loaded & ((NEVER | SHARED) - MAY[words])) == []
    assert sum(name.partition(".")[0] == "thaw" for name in loaded) <= MOST


def test_help_loads_click_and_nothing_that_reads(tmp_path: Path) -> None:
    loaded = loaded_by(tmp_path, ["--help"])
    assert "click" in loaded
    assert not loaded & {"rich", "msgspec", "sqlite3", "blake3", "pathlib"}
    assert {name for name in loaded if name.startswith("thaw")} == {
        "thaw", "thaw._version", "thaw.cli", "thaw.cli.app", "thaw.cli.catalog", "thaw.cli.group", "thaw.cli.light"
    }  # fmt: skip


def test_the_check_itself_sees_what_click_loads(tree: Shell) -> None:
    assert {"click", "inspect"} <= loaded_by(tree.cwd, ["log", "-n1"])
    more = loaded_by(tree.cwd, ["gc", "--dry-run"])
    assert sum(name.partition(".")[0] == "thaw" for name in more) > MOST


# -- the words

WORDS = (
    "main", "main~1", "HEAD", "3", "0", "-1", "1.5", "x", "", "-n", "-n2", "--limit", "--json", "--js", "--graph",
    "--all", "--text", "--tokens", "-d", "--delete", "-m", "--move", "-C", "here", "--repo", "--repo=here", "--help",
    "-h", "--", "--prefill-rate", "1e3", "nan", "-dm", "-",
)  # fmt: skip


def by_click(verb: light.Light, words: list[str]) -> dict[str, Any] | None:
    """What click makes of them; None where it refuses them or prints help."""
    import click

    group = click.Group("thaw")
    command = verb.command()
    group.add_command(command)
    try:
        outer = group.make_context("thaw", [verb.name, *words])
        outer.obj = "outer"
        return dict(command.make_context(verb.name, list(words), parent=outer).params)
    except (click.ClickException, click.exceptions.Exit):
        return None


def verb_of(name: str) -> light.Light:
    from importlib import import_module

    found = import_module(f"thaw.cli.verbs.{name}").command
    assert isinstance(found, light.Light)
    return found


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(catalog.LIGHT), st.lists(st.sampled_from(WORDS), max_size=5))
def test_words_that_are_read_without_click_mean_what_they_mean_to_click(name: str, words: list[str]) -> None:
    import contextlib
    import io

    verb = verb_of(name)
    read = verb.read(words, "outer")
    if read is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert repr(read) == repr({key: by_click(verb, words)[key] for key in read})  # type: ignore[index]


@pytest.mark.parametrize("name", catalog.LIGHT)
def test_plain_words_are_read_without_click(name: str) -> None:
    words = {"diff": ["a", "b"]}.get(name, [])
    assert verb_of(name).read([*words, "--json", "-C", "there"], None) is not None
    assert light.plain(["-C", "there", name, *words], catalog.LIGHT) is not None
    assert light.plain([name, "--help"], catalog.LIGHT) is None
    assert light.plain(["--version"], catalog.LIGHT) is light.plain([], catalog.LIGHT) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("log", "--nope"), "No such option"),
        (("log", "-n", "0"), "'-n'"),
        (("log", "a", "b"), "unexpected extra argument"),
        (("diff",), "Missing argument 'A'"),
        (("log", "main", "--all"), "leave out POINT"),
        (("branch", "-d", "-m"), "use only one of them"),
        (("stats", "--prefill-rate", "0"), "--prefill-rate"),
    ],
)
def test_wrong_words_are_refused_as_ever(tree: Shell, words: tuple[str, ...], says: str) -> None:
    refused = tree(*words)
    assert refused.code == 2 and says in refused.err
    error = tree(*words, "--json").json()["error"]
    assert error["kind"] == "usage" and says in error["message"]
