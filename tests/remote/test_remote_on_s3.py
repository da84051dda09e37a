"""Over HTTP with keys, on a store that speaks S3: the command line pushes, clones and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hosts import kv_of, tree
from servers import StoreServer
from store_fixtures import moto_server, store_keys  # noqa: F401 - fixtures

import thaw
from thaw.engines.base import Engine

SOURCE = Path(__file__).resolve().parents[2] / "src"


def run(cwd: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "thaw.cli", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_a_session_goes_on_from_a_bucket(
    moto_server: StoreServer,  # noqa: F811 - a fixture
    engine: Engine,
    far_engine: Engine,
    tmp_path: Path,
) -> None:
    address = moto_server.address("runs/one")
    with thaw.open(tmp_path / "here", engine=engine) as here:
        here.add_remote("origin", address.url, dict(address.options))
        tree(here, "a document that is long enough to be shared. " * 60, 3)
        here.tag("v1", "main")
        assert here.push(all=True, tags=True).num_commits == 4
        there = thaw.clone(address.url, tmp_path / "there", engine=far_engine, options=dict(address.options))
        with there:
            for name in ("main", "fork/0", "fork/1", "fork/2"):
                assert kv_of(there.store, there.resolve(f"origin/{name}").commit) == kv_of(
                    here.store, here.resolve(name).commit
                )
            with there.fork("origin/fork/2", 4) as kids:
                assert all(proof.hit and proof.num_recomputed_tokens == 0 for proof in kids.proofs)
                kids[0].commit("further", branch="further")
            assert [ref.outcome for ref in there.push("further").refs] == ["new"]
        assert here.fetch().num_commits == 1 and here.resolve("origin/further")
        here.push("further", delete=True)
        here.push("v1", delete=True)
        assert here.remote_gc(grace_s=0, keep_reflog_s=0).num_condemned >= 1
        assert here.remote_gc(grace_s=0, keep_reflog_s=0).num_deleted >= 1


def test_the_command_line_takes_the_address_and_its_options(
    moto_server: StoreServer,  # noqa: F811 - a fixture
    tmp_path: Path,
) -> None:
    address = moto_server.address("runs/two")
    options = [word for key, value in address.options.items() for word in ("-o", f"{key}={str(value).lower()}")]
    run(tmp_path, "init", "a", "--engine", "fake")
    run(tmp_path, "-C", "a", "run", "a document that is long enough to share. ", "--no-generate", "-m", "read it")
    run(tmp_path, "-C", "a", "remote", "add", "origin", address.url, *options)
    sent = json.loads(run(tmp_path, "-C", "a", "push", "-u", "origin", "main", "--json"))
    assert sent["refs"][0]["outcome"] == "new" and sent["nbytes"] > 0
    run(tmp_path, "clone", address.url, "b", "--engine", "fake", *options)
    assert "origin/main" in run(tmp_path, "-C", "b", "log", "origin/main")
    forked = json.loads(
        run(tmp_path, "-C", "b", "fork", "origin/main", "Why?", "-n", "2", "--max-tokens", "4", "--json")
    )
    assert len(forked["children"]) == 2
    run(tmp_path, "-C", "b", "push", "origin", "fork/0", "fork/1")
    assert "origin/fork/1" in run(tmp_path, "-C", "a", "fetch")
    assert "up to date" in run(tmp_path, "-C", "a", "pull")
    listed = json.loads(run(tmp_path, "-C", "a", "remote", "list", "--json"))["remotes"]
    assert listed[0]["url"] == address.url and set(listed[0]["points"]) == {
        f"origin/{n}" for n in ("main", "fork/0", "fork/1")
    }
    run(tmp_path, "-C", "b", "push", "--delete", "origin", "fork/0")
    assert "deleted" in run(tmp_path, "-C", "a", "fetch", "--prune")
    assert json.loads(run(tmp_path, "-C", "a", "remote", "gc", "--dry-run", "--json"))["phase"] == "done"
    run(tmp_path, "-C", "a", "remote", "rm", "origin")
