"""What the verbs say of KV that was kept over a policy step."""

from __future__ import annotations

import pytest

import thaw

from .conftest import Shell

SAID = "tokens 0-49 policy '0', 50-89 policy 'other', 90-119 policy '0'"


@pytest.fixture
def kept(shell: Shell) -> Shell:
    """main: 50 tokens of policy 0, 40 of another, 30 of policy 0 again; main~1: the first 50."""
    with (
        thaw.load_engine("fake") as engine,
        thaw.open(shell.cwd / ".thaw", engine=engine) as repo,
        repo.session(seed=3, stale_kv=True) as session,
    ):
        session.append("a" * 50)
        session.commit("one policy", branch="main")
        engine.set_policy("other")
        session.append("b" * 40)
        engine.set_policy("0")
        session.append("c" * 30)
        session.commit("kept", branch="main")
    return shell


def test_show_log_and_verify_name_the_policies(kept: Shell) -> None:
    assert f"KV          of {SAID}\n" in kept.ok("show").out
    assert f", KV of {SAID[:55]}" in kept.ok("log", COLUMNS="160").out
    assert f"KV of {SAID}, taken as it is\n" in kept.ok("verify", "main").out
    ranges = kept.ok("show", "--json").json()["kv_ranges"]
    assert [(one["start"], one["end"], one["policy"]) for one in ranges] == [
        (0, 50, "0"), (50, 90, "other"), (90, 120, "0"),
    ]  # fmt: skip
    assert kept.ok("log", "--json").json()["commits"][0]["kv_ranges"] == ranges
    report = kept.ok("verify", "main", "--json").json()
    assert report["ok"] and report["kv_ranges"] == ranges


def test_of_a_point_of_one_policy_nothing_is_said(kept: Shell) -> None:
    for point in ("main~1", "main:30"):
        assert "KV          of" not in kept.ok("show", point).out
        assert "kv_ranges" not in kept.ok("show", point, "--json").json()
        assert kept.ok("verify", point, "--json").json()["kv_ranges"] == []
    assert "kv_ranges" not in kept.ok("log", "main~1", "--json").json()["commits"][0]


def test_verbs_that_go_on_refuse_it_and_may_recompute(kept: Shell) -> None:
    refused = kept("run", "--from", "main", "and?", "--max-tokens", "2")
    assert refused.code == 3 and "policy 'other'" in refused.err and "stale_kv=True" in refused.err
    kept.ok("run", "--from", "main", "and?", "--max-tokens", "2", "--recompute", "-m", "again")
    assert "kv_ranges" not in kept.ok("show", "--json").json()
    kept.ok("run", "--from", "main~1:30", "--branch", "early", "and?", "--max-tokens", "2")
