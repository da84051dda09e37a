"""Over HTTP with keys, on stores that speak S3 and Azure's protocol: the command line pushes, clones and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import commit, kv_of, read_all, remote, tokens, tree, wish
from proxy import Fault, proxied
from servers import ENVIRONMENT, StoreServer, free_port
from store_fixtures import azurite_server, moto_server, seaweed_server, store_keys  # noqa: F401 - fixtures

import thaw
from thaw.core.errors import ThawError
from thaw.engines.base import Engine
from thaw.remote import layout, refs
from thaw.remote.address import open_bucket
from thaw.remote.bucket import Bucket
from thaw.remote.fetch import fetch
from thaw.remote.gc import GcWish, collect
from thaw.remote.layout import NamespaceBucket
from thaw.remote.push import push
from thaw.store import Store

STARTS = pytest.mark.slow("starts a real object store")
SOURCE = Path(__file__).resolve().parents[2] / "src"


def asked(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "thaw.cli", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def run(cwd: Path, *words: str) -> str:
    done = asked(cwd, *words)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "store", ["moto_server", pytest.param("seaweed_server", marks=STARTS), pytest.param("azurite_server", marks=STARTS)]
)
def test_a_session_goes_on_from_a_bucket(
    store: str, request: pytest.FixtureRequest, engine: Engine, far_engine: Engine, tmp_path: Path
) -> None:
    server: StoreServer = request.getfixturevalue(store)
    address = server.address("runs/one")
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
            there.remove_remote("origin")
            there.add_remote("origin", address.url, dict(address.options))
            with there.fork("origin/fork/2", 4, fetch=True) as kids:
                assert all(proof.hit and proof.num_recomputed_tokens == 0 for proof in kids.proofs)
                kids[0].commit("further", branch="further")
            assert [ref.outcome for ref in there.push("further").refs] == ["new"]
        assert here.fetch().num_commits == 1 and here.resolve("origin/further")
        here.push("further", delete=True)
        here.push("v1", delete=True)
        assert here.remote_gc(grace_s=0, keep_reflog_s=0).num_condemned >= 1
        assert here.remote_gc(grace_s=0, keep_reflog_s=0).num_deleted >= 1
    kept = [path for host in ("here", "there") for path in (tmp_path / host).rglob("*") if path.is_file()]
    secrets = [value.encode() for name, value in ENVIRONMENT.items() if name.endswith(("_KEY", "_KEY_ID"))]
    assert kept and not [path for path in kept for secret in secrets if secret in path.read_bytes()]


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
    run(tmp_path, "-C", "a", "run", "and more of it. ", "--no-generate")
    run(tmp_path, "-C", "a", "push")
    words = ["fork", "origin/main", "Why?", "-n", "2", "--name", "newer", "--max-tokens", "4", "--fetch", "--json"]
    assert len(json.loads(run(tmp_path, "-C", "b", *words))["children"]) == 2
    assert "and more of it" in run(tmp_path, "-C", "b", "show", "newer/0")
    run(tmp_path, "-C", "b", "push", "origin", "fork/0", "fork/1")
    assert "origin/fork/1" in run(tmp_path, "-C", "a", "fetch")
    assert "up to date" in run(tmp_path, "-C", "a", "pull")
    listed = json.loads(run(tmp_path, "-C", "a", "remote", "list", "--json"))["remotes"]
    assert listed[0]["url"] == address.url and set(listed[0]["points"]) == {
        f"origin/{n}" for n in ("main", "fork/0", "fork/1")
    }
    run(tmp_path, "-C", "b", "tag", "v1", "origin/main")
    tagged = json.loads(run(tmp_path, "-C", "b", "push", "--tags", "--json"))["refs"]
    assert [(ref["kind"], ref["name"], ref["outcome"]) for ref in tagged] == [("tag", "v1", "new")]
    assert "v1" in run(tmp_path, "-C", "a", "fetch") and "v1" in run(tmp_path, "-C", "a", "log", "v1")
    run(tmp_path, "-C", "b", "push", "--delete", "origin", "fork/0")
    assert "deleted" in run(tmp_path, "-C", "a", "fetch", "--prune")
    assert json.loads(run(tmp_path, "-C", "a", "remote", "gc", "--dry-run", "--json"))["phase"] == "done"
    run(tmp_path, "-C", "a", "remote", "rm", "origin")


def test_a_shallow_clone_of_a_bucket_is_deepened_on_the_command_line(
    moto_server: StoreServer,  # noqa: F811 - a fixture
    tmp_path: Path,
) -> None:
    address = moto_server.address("runs/shallow")
    options = [word for key, value in address.options.items() for word in ("-o", f"{key}={str(value).lower()}")]
    run(tmp_path, "init", "a", "--engine", "fake")
    for part in range(4):
        run(tmp_path, "-C", "a", "run", f"part {part} of a document. ", "--no-generate", "-m", f"part {part}")
    run(tmp_path, "-C", "a", "remote", "add", "origin", address.url, *options)
    run(tmp_path, "-C", "a", "push")
    run(tmp_path, "clone", address.url, "b", "--engine", "fake", "--depth", "1", *options)
    (only,) = json.loads(run(tmp_path, "-C", "b", "log", "--json"))["commits"]
    assert only["shallow"] is True and only["message"] == "part 3"
    assert "shallow" in run(tmp_path, "-C", "b", "log") and "not fetched" in run(tmp_path, "-C", "b", "show")
    words = ["fork", "origin/main", "Why?", "-n", "2", "--max-tokens", "4", "--json"]
    assert len(json.loads(run(tmp_path, "-C", "b", *words))["children"]) == 2
    run(tmp_path, "-C", "b", "push", "origin", "fork/0")
    refused = [sys.executable, "-m", "thaw.cli", "-C", "b", "show", "main~1"]
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1"}
    done = subprocess.run(refused, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "thaw fetch --unshallow origin" in done.stderr
    assert json.loads(run(tmp_path, "-C", "b", "fetch", "origin", "main", "--depth", "3", "--json"))["num_commits"] == 2
    run(tmp_path, "-C", "b", "fetch", "--unshallow")
    whole = json.loads(run(tmp_path, "-C", "b", "log", "--json"))["commits"]
    assert [entry["message"] for entry in whole] == [f"part {part}" for part in (3, 2, 1, 0)]
    assert not any("shallow" in entry for entry in whole) and "part 0" in run(tmp_path, "-C", "b", "show", "main~3")


def test_names_are_cloned_used_and_forgotten_on_the_command_line(tmp_path: Path) -> None:
    url = (tmp_path / "bucket").as_uri()
    run(tmp_path, "init", "a", "--engine", "fake")
    run(tmp_path, "-C", "a", "run", "a document that is long enough to share. ", "--no-generate", "-m", "read it")
    run(tmp_path, "-C", "a", "remote", "add", "origin", url)
    run(tmp_path, "-C", "a", "push")
    run(tmp_path, "clone", url, "b", "--engine", "fake", "--refs-only")
    listed = json.loads(run(tmp_path, "-C", "b", "remote", "list", "--json"))["remotes"]
    assert list(listed[0]["not_fetched"]) == ["origin/main"] and not listed[0]["points"]
    assert not list((tmp_path / "b" / ".thaw" / "packs").iterdir())
    told = asked(tmp_path, "-C", "b", "log")
    assert told.returncode == 0 and "`thaw pull`" in told.stderr and "origin/main" in told.stderr
    told = asked(tmp_path, "-C", "b", "show", "main")
    assert told.returncode == 2 and "there are: origin/main (not fetched yet)" in told.stderr
    told = asked(tmp_path, "-C", "b", "run", "another beginning")
    assert told.returncode == 2 and "`thaw pull` brings it" in told.stderr
    words = ["fork", "origin/main", "Why?", "-n", "2", "--max-tokens", "4", "--json"]
    assert len(json.loads(run(tmp_path, "-C", "b", *words))["children"]) == 2
    assert "not fetched" not in run(tmp_path, "-C", "b", "remote", "list")
    told = asked(tmp_path, "-C", "b", "run", "another beginning")
    assert told.returncode == 2 and "`thaw pull` brings it" in told.stderr
    told = asked(tmp_path, "-C", "b", "run", "a text", "--branch", "origin/mine")
    assert told.returncode == 2 and "only fetch and push move it" in told.stderr and not told.stdout
    run(tmp_path, "-C", "b", "pull")
    run(tmp_path, "-C", "b", "run", "it goes on", "--no-generate")
    assert len(json.loads(run(tmp_path, "-C", "b", "log", "--json"))["commits"]) == 2
    run(tmp_path, "-C", "b", "push", "origin", "fork/0", "fork/1")
    gone = json.loads(run(tmp_path, "-C", "b", "forget", "--remote", "origin", "fork/0", "--json"))
    assert gone["num_commits"] == 1 and gone["num_rewritten_packs"] == 1 and gone["old_versions"] == "none"
    assert "forgot fork/1" in run(tmp_path, "-C", "b", "forget", "--remote", "origin", "fork/1")
    assert {ref["name"] for ref in json.loads(run(tmp_path, "-C", "a", "fetch", "--json"))["refs"]} == {"origin/main"}
    run(tmp_path, "-C", "b", "push", "origin", "fork/0")
    run(tmp_path, "-C", "b", "push", "--delete", "origin", "fork/0")
    keep = ("--grace-hours", "0", "--keep-days", "0")
    told = run(tmp_path, "-C", "b", "remote", "gc", "--dry-run", *keep)
    assert "nothing was deleted; of no use: 2 objects" in told
    assert "2 objects of no use" in run(tmp_path, "-C", "b", "remote", "gc", *keep)
    assert "written down; they can be deleted in" in run(tmp_path, "-C", "b", "remote", "gc", "--dry-run")
    assert "deleted 2 objects" in run(tmp_path, "-C", "b", "remote", "gc", *keep)


BAD_DAYS = (
    Fault(drop=True), Fault(lose=True), Fault(status=503), Fault(status=500, made=True), Fault(status=409),
    Fault(status=412), Fault(cut=0.5), Fault(delay_s=0.05),
)  # fmt: skip


@pytest.mark.slow("waits between tries")
def test_whatever_the_network_does_only_our_errors_are_seen_and_nothing_is_lost(
    moto_server: StoreServer,  # noqa: F811 - a fixture
    tmp_path: Path,
) -> None:
    """Two hosts push in turn to one branch and one of their own, fetch and collect garbage. What a push said it did, it
    did, once; what it said it did not, harms nobody."""
    with proxied(moto_server.endpoint, free_port()) as proxy:
        bucket = open_bucket(moto_server.address("bad-days", endpoint=proxy.endpoint))
        stores = [Store.init(tmp_path / f"host{number}") for number in range(2)]
        proxy.shaken(random.Random(5), 0.15, *BAD_DAYS)
        done: list[str] = []
        for turn in range(10):
            store = stores[turn % 2]
            with contextlib.suppress(ThawError):  # any other error fails the test
                fetch(store, remote(bucket))
            with contextlib.suppress(ThawError):
                done.append(one_push(store, bucket, turn))
            if turn % 3 == 2:
                with contextlib.suppress(ThawError):
                    collect(remote(bucket), GcWish(grace_s=0.0))
        assert sum(proxy.faults.values()) >= 20 and len(proxy.faults) >= 6, proxy.faults
        assert len(done) >= 4, "most pushes come through"
        proxy.calm()
        with Store.init(tmp_path / "there") as there:
            fetch(there, remote(bucket))
            for commit_id in there.commits():
                read_all(there, commit_id)
            assert there.fsck().ok
        part = NamespaceBucket(bucket, "")
        assert sorted(one for one in moves_of_main(part) if one in done) == sorted(done)
        for store in stores:
            store.close()


def one_push(store: Store, bucket: Bucket, turn: int) -> str:
    """A commit on top of the remote's `main`, pushed; returns it."""
    there = store.ref("origin/main")
    parents = () if there is None else (there.target,)
    made = commit(store, tokens(60, turn), branch="main", parents=parents)
    push(store, remote(bucket), [wish(store, "main")])
    return made


def moves_of_main(part: NamespaceBucket) -> list[str]:
    """Every commit that `main` of the remote was moved to."""
    last = refs.read(part, "branch", "main")
    assert last is not None and last.ref.commit is not None
    keys = [layout.reflog_key("branch", "main", number) for number in range(1, last.ref.generation)]
    found = [part.read(key) for key in keys]
    assert all(one is not None for one in found), "the reflog has a gap"
    before = [refs.decode(one.data, "branch", "main").commit for one in found if one is not None]
    return [one for one in (*before, last.ref.commit) if one is not None]
