"""`thaw pool run` and `thaw pool status`: real processes, the fake engine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import SOURCE, Shell

CLIENT = Path(__file__).resolve().parents[1] / "pool" / "pool_client.py"


def test_a_round_from_a_point_says_what_came_and_where_it_ran(tree: Shell, tmp_path: Path) -> None:
    words = ("pool", "run", "main", "Why?", "How?", "--workers", "2", "--spread", "2", "--max-tokens", "6")
    found = tree.ok(*words, "--ignore-eos", "--json", THAW_CACHE_DIR=str(tmp_path)).json()
    assert [row["prompt"] for row in found["branches"]] == ["Why?", "How?"]
    assert {row["worker"] for row in found["branches"]} == {"worker-0", "worker-1"}
    for row in found["branches"]:
        assert row["decision"]["action"] == "hydrate" and row["restore"]["num_recomputed_tokens"] == 0
        assert len(row["token_ids"]) == 6 and row["error"] is None and row["commit"] is None
    assert len(found["pool"]["workers"]) == 2
    assert len(tree.ok("branch", "--json").json()["branches"]) == 3, "nothing is committed unasked"


def test_a_name_commits_the_results_as_branches(tree: Shell, tmp_path: Path) -> None:
    out = tree.ok("pool", "run", "main", "-n", "2", "--max-tokens", "4", "--name", "try", THAW_CACHE_DIR=str(tmp_path))
    assert "try/0" in out.out and "hydrate from disk" in out.out
    assert tree.ok("show", "try/1", "--json").json()["parents"] == [tree.commit("main")]


def test_a_branch_that_fails_is_shown_and_the_exit_code_says_so(tree: Shell, tmp_path: Path) -> None:
    found = tree(
        "pool", "run", "main", "-n", "1", "--max-tokens", "30000", "--ignore-eos", "--timeout", "0.3", "--json",
        THAW_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    assert found.code == 8 and found.json()["branches"][0]["error"]["kind"] == "timed-out"


@pytest.mark.slow("starts a pool")
def test_status_shows_the_pools_that_run_and_says_when_there_is_none(shell: Shell, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "THAW_CACHE_DIR": str(tmp_path)}
    client = subprocess.Popen([sys.executable, str(CLIENT), "process"], stdout=subprocess.PIPE, env=env, text=True)
    assert client.stdout is not None
    try:
        client.stdout.readline()
        time.sleep(3)
        mine = [one for one in shell.ok("pool", "status", "--json").json()["pools"] if one["pid"] == client.pid]
        assert len(mine) == 1 and mine[0]["engine"] == "fake" and mine[0]["stats"]["running"] == 8
        text = shell.ok("pool", "status").out
        assert f"pool of process {client.pid}" in text and "worker-1" in text
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
    gone = shell("pool", "status", "--json")
    assert all(one["pid"] != client.pid for one in gone.json()["pools"])


def test_a_setting_that_is_none_is_refused(tree: Shell) -> None:
    assert tree("pool", "run", "main", "--set", "x").code == 2
