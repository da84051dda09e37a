"""The verbs on models of several cache groups: two full ones; a full one, a window and a point state, kept at the
ends of sessions alone, as real engines do."""

from __future__ import annotations

import pytest

import thaw

from .conftest import Shell

TEXT = "a document that is long enough to share. " * 15


@pytest.fixture(params=["two", "hybrid"])
def told(request: pytest.FixtureRequest, shell: Shell) -> Shell:
    """main: a text that was read, and a completion; the repository remembers its engine."""
    with (
        thaw.load_engine("fake", groups=str(request.param), interior=request.param == "two") as engine,
        thaw.open(shell.cwd / ".thaw", engine=engine) as repo,
        repo.session(seed=3) as s,
    ):
        s.append(TEXT)
        s.commit("read it", branch="main")
    shell.ok("run", "--from", "main", "Why? ", "--max-tokens", "12", "-m", "asked")
    return shell


def test_what_cannot_be_run_is_refused_before_a_model_is_loaded(told: Shell) -> None:
    """The control: what can be is refused by the engine, which does not know an option."""
    end = told.ok("show", "--json").json()["num_tokens"]
    unloadable = ("x", "--engine", "fake", "--dtype", "bfloat16")
    for asked, said in (
        (
            ("--point", str(end)),
            f"points [{end}]: a point is a number of tokens of the whole session, here {end + 1} or",
        ),
        (("--from", "main~1"), "--branch NAME"),
        (("--from", "nobody"), "nobody"),
        (("--point", str(end + 1)), "unexpected keyword argument 'dtype'"),
    ):
        early = told("run", *asked, *unloadable)
        assert early.code == 2 and said in early.err, (asked, early.err)


def is_hybrid(shell: Shell) -> bool:
    return len(shell.ok("show", "--json").json()["model"]["groups"]) == 3


def test_a_tree_is_forked_compared_verified_and_adopted(told: Shell) -> None:
    told.ok("fork", "main~1", "Why?", "How?", "--max-tokens", "12", "--name", "k")
    assert len(told.ok("log", "--all", "--json").json()["commits"]) == 4
    parted = told.ok("diff", "k/0", "k/1", "--json").json()
    assert parted["num_common_tokens"] == len(TEXT) and parted["nbytes_shared"] > 0 and not parted["equal"]
    for point in ("main", "main~1", "k/1"):
        report = told.ok("verify", point, "--json").json()
        assert all(law["held"] is not False for law in report["laws"]), report
    told.ok("adopt", "k/1", "main")
    assert told.commit("main") == told.commit("k/1")
    told.ok("run", "--from", "main", "And? ", "--max-tokens", "4")
    told.ok("branch", "-d", "k/0")
    told.ok("gc")
    assert told.ok("fsck", "--json").json()["problems"] == []
    assert told.ok("stats", "--json").json()["kv_nbytes"] > 0


def test_show_lists_what_can_be_gone_on_from_and_another_token_is_refused(told: Shell) -> None:
    shown, end = told.ok("show", "--json").json(), len(TEXT)
    early = told("run", "--from", "main:100", "--branch", "early", "x", "--max-tokens", "2")
    if not is_hybrid(told):
        assert "resumable" not in shown and early.code == 0
        return
    asked = end + len("Why? ")
    assert shown["resumable"] == [end, end + 1, asked, shown["num_tokens"]], "turn ends, and one after a kept state"
    assert f"{end}, {end + 1}" in told.ok("show").out
    assert early.code == 3 and str(end + 1) in early.err and "100" in early.err
    told.ok("run", "--from", f"main:{end + 1}", "--branch", "late", "x", "--max-tokens", "2")


def test_match_ends_where_it_can_be_gone_on_from(told: Shell) -> None:
    found = told.ok("match", TEXT + "Why? and something else", "--json").json()
    longest = len(TEXT) + len("Why? ")
    assert found["num_matched"] == longest, "it is the end of a turn"
    inside = told.ok("match", TEXT + "Whom?", "--json").json()
    assert inside["num_matched"] == len(TEXT) + (1 if is_hybrid(told) else len("Wh")), inside


def test_a_token_that_was_not_kept_is_read_again_where_that_is_allowed(told: Shell) -> None:
    run = ("run", "--from", "main:token=100", "--branch", "early", "x", "--max-tokens", "2", "--json")
    assert told(*run).code == (3 if is_hybrid(told) else 0)
    again = told.ok(*run[:4], "again", *run[5:], "--recompute").json()
    assert again["proof"]["num_recomputed_tokens"] == (100 if is_hybrid(told) else 0)
    assert told.ok("show", "again", "--json").json()["num_tokens"] == 103
    told.ok("fork", "main:token=200", "x", "y", "--max-tokens", "2", "--name", "f", "--recompute")
    assert all(law["held"] is not False for law in told.ok("verify", "f/1", "--json").json()["laws"])


@pytest.mark.parametrize("groups", ["two", "states"])
def test_a_point_that_is_asked_for_is_kept_listed_and_forked_from(groups: str, shell: Shell) -> None:
    """Where every token is kept, asking changes nothing."""
    with (
        thaw.load_engine("fake", groups=groups, interior=groups == "two") as engine,
        thaw.open(shell.cwd / ".thaw", engine=engine) as repo,
        repo.session(seed=3) as s,
    ):
        s.append("begun")
        s.commit("begun", branch="main")
    (shell.cwd / "doc.txt").write_text(TEXT)
    shell.ok("run", "--file", "doc.txt", "--branch", "doc", "--point", "100", "--point", "200", "--no-generate")
    (entry,) = shell.ok("log", "doc", "--json").json()["commits"]
    shown, total = shell.ok("show", "doc"), len(TEXT)
    if groups == "states":
        assert entry["points"] == [100, 200, total - 1, total] and entry["state_nbytes"] == 30
        assert f"4 of 30 B each, after 100, 200, {total - 1}, {total} tokens" in shown.out
        assert "4 states (120 B)" in shell.ok("log", "doc").out
    else:
        assert "points" not in entry and "states" not in shown.out
    out = shell.ok("fork", "doc:token=100", "x", "yz", "--max-tokens", "2", "--name", "p", "--json").json()
    counts = [child["usage"]["num_prefilled_tokens"] for child in out["children"]]
    assert counts == ([1, 2] if groups == "states" else [2, 3])
    late = shell("run", "--from", "doc", "--point", "5", "x", "--max-tokens", "1")
    assert late.code == 2 and "still to be read" in late.err


def test_a_point_that_was_asked_for_can_be_continued_from(told: Shell) -> None:
    """On a model with a window and a state too; there no token beside it can."""
    begin = told.ok("show", "--json").json()["num_tokens"]
    point = begin + 20
    told.ok("run", "--from", "main", "--branch", "far", "--point", str(point), "and so on " * 5, "--max-tokens", "1")
    told.ok("run", "--from", f"far:{point}", "--branch", "there", "x", "--max-tokens", "2")
    beside = told("run", "--from", f"far:{point - 5}", "--branch", "beside", "x", "--max-tokens", "2")
    assert beside.code == (3 if is_hybrid(told) else 0), beside.err
