"""A remote's bucket keeps its word, in a folder and on real servers, over a good network and over a bad one."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from proxy import Fault, StoreProxy, proxied
from servers import BUCKET, READER, StoreServer, free_port
from store_fixtures import azurite_server, localbucket_server, moto_server, seaweed_server, store_keys

from thaw.core.errors import (
    Busy,
    InvalidRequest,
    RemoteDenied,
    RemoteError,
    RemoteMissing,
    RemoteUncertain,
    RemoteUnreachable,
    RemoteUnsafe,
    ThawError,
)
from thaw.remote import folder as folder_module
from thaw.remote import retry
from thaw.remote.address import open_bucket, parse
from thaw.remote.bucket import Bucket, FoundObject, Version, check_key
from thaw.remote.folder import FolderBucket
from thaw.remote.probe import probe
from thaw.remote.retry import LONGEST_WAIT_S, attempts

__all__ = ["azurite_server", "localbucket_server", "moto_server", "seaweed_server", "store_keys"]

STARTS = pytest.mark.slow("starts a server of its own")
STORES = [pytest.param("seaweed_server", marks=STARTS), pytest.param("azurite_server", marks=STARTS)]
WRITERS, MOVES, KILLS = 8, 25, 20
NETWORK = (
    Fault(drop=True), Fault(lose=True), Fault(cut=0.5), Fault(status=503), Fault(status=500),
    Fault(status=500, made=True), Fault(status=409), Fault(delay_s=0.02),
)  # fmt: skip


@pytest.fixture(params=["folder", "moto_server", *STORES])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    """A new one, empty."""
    if request.param == "folder":
        return open_bucket(parse((tmp_path / "bucket").as_uri()))
    server: StoreServer = request.getfixturevalue(request.param)
    return open_bucket(server.address())


@pytest.fixture(params=["folder", *STORES])
def contended(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    """A new one, of a store that checks and writes in one step. moto may accept two writes from one version."""
    if request.param == "folder":
        return open_bucket(parse((tmp_path / "bucket").as_uri()))
    server: StoreServer = request.getfixturevalue(request.param)
    return open_bucket(server.address())


@pytest.fixture(scope="module")
def moto_proxy(moto_server: StoreServer) -> Iterator[StoreProxy]:
    with proxied(moto_server.endpoint, free_port()) as proxy:
        yield proxy


@pytest.fixture
def proxy(moto_proxy: StoreProxy) -> StoreProxy:
    moto_proxy.calm()
    return moto_proxy


@pytest.fixture
def shaky(proxy: StoreProxy, moto_server: StoreServer) -> Bucket:
    """A new bucket behind the proxy."""
    return open_bucket(moto_server.address(endpoint=proxy.endpoint, timeout_s=5))


# What a bucket keeps.


def test_what_was_put_is_there_whole(bucket: Bucket) -> None:
    data = os.urandom(20 << 20)
    bucket.put("packs/1/a", memoryview(bytearray(data)))
    bucket.put("empty", b"")
    found, empty = bucket.read("packs/1/a"), bucket.read("empty")
    assert found is not None and found.data == data and bucket.size("packs/1/a") == len(data)
    assert empty is not None and empty.data == b"" and bucket.size("empty") == 0
    bucket.put("packs/1/a", b"shorter")
    again = bucket.read("packs/1/a")
    assert again is not None and again.data == b"shorter" and again.version != found.version


def test_what_is_not_there_is_none(bucket: Bucket) -> None:
    assert bucket.read("no/such") is None and bucket.size("no/such") is None
    assert list(bucket.entries("no")) == []
    bucket.delete([])
    bucket.delete(["no/such", "none"])


def test_ranges_are_the_bytes_asked_for_in_that_order(bucket: Bucket) -> None:
    data = os.urandom(5 << 20)
    bucket.put("pack", data)
    wanted = [(4 << 20, 1 << 20), (0, 1), (17, 0), (3, 5), (2, 9), (5 << 20, 0), (2_500_000, 100_000), (1 << 20, 1)]
    parts = bucket.read_ranges("pack", wanted)
    assert [bytes(part) for part in parts] == [data[start : start + length] for start, length in wanted]
    assert all(part.readonly for part in parts) and bucket.read_ranges("pack", []) == []


@pytest.mark.parametrize("wanted", [(1000, 1), (990, 11), (5000, 10), (0, 1001)])
def test_ranges_past_the_end_are_errors(bucket: Bucket, wanted: tuple[int, int]) -> None:
    bucket.put("pack", bytes(1000))
    with pytest.raises(RemoteMissing, match=r"ends at byte 1000, but bytes up to \d+ were written"):
        bucket.read_ranges("pack", [(0, 10), wanted])
    with pytest.raises(RemoteMissing, match="nothing"):
        bucket.read_ranges("nothing", [wanted])
    assert [bytes(part) for part in bucket.read_ranges("pack", [(990, 10)])] == [bytes(10)]


def test_a_create_is_the_first_or_none(bucket: Bucket) -> None:
    first = bucket.create("refs/a", b"one")
    assert first is not None and bucket.create("refs/a", b"two") is None
    found = bucket.read("refs/a")
    assert found is not None and found.data == b"one" and found.version.e_tag == first.e_tag


def test_a_swap_needs_the_version_that_is_there(bucket: Bucket) -> None:
    first = bucket.create("refs/a", b"one")
    assert first is not None
    second = bucket.swap("refs/a", b"two", first)
    assert second is not None and second != first
    assert bucket.swap("refs/a", b"three", first) is None, "a stale version"
    found = bucket.read("refs/a")
    assert found is not None and found.data == b"two" and bucket.swap("refs/a", b"four", found.version) is not None
    assert bucket.swap("refs/b", b"one", first) is None and bucket.read("refs/b") is None


def test_entries_are_of_whole_segments(bucket: Bucket) -> None:
    before = bucket.now()
    for key in ("packs/1/a", "packs/1/b", "packs/10/c", "packs2/d", "refs/branch/a=b.c_d-e"):
        bucket.put(key, key.encode())
    assert {entry.key for entry in bucket.entries("packs/1")} == {"packs/1/a", "packs/1/b"}
    every = {entry.key: entry for entry in bucket.entries("")}
    assert set(every) == {"packs/1/a", "packs/1/b", "packs/10/c", "packs2/d", "refs/branch/a=b.c_d-e"}
    assert all(entry.size == len(key) and entry.modified >= int(before) for key, entry in every.items())
    bucket.delete(["packs/1/a", "packs/1/x", "packs2/d"])
    assert {entry.key for entry in bucket.entries("")} == set(every) - {"packs/1/a", "packs2/d"}


def test_the_clock_is_the_stores(bucket: Bucket) -> None:
    first, second = bucket.now(), bucket.now()
    assert abs(first - time.time()) < 5 and second >= first


def test_remotes_side_by_side_see_nothing_of_one_another(moto_server: StoreServer) -> None:
    one, other = (open_bucket(moto_server.address(prefix)) for prefix in ("team/a", "team/ab"))
    one.put("x", b"1")
    assert other.read("x") is None and list(other.entries("")) == [] and [e.key for e in one.entries("")] == ["x"]


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/.b", "ä", "a b", "a%b", "a\n", "x" * 901]
)
def test_odd_names_are_refused(tmp_path: Path, key: str) -> None:
    bucket = FolderBucket(tmp_path)
    for call in (
        check_key,
        bucket.read,
        bucket.size,
        lambda key: bucket.put(key, b""),
        lambda key: bucket.delete([key]),
    ):
        with pytest.raises(InvalidRequest, match="no name of a remote's object"):
            call(key)


# Many at once.


def moved(bucket: Bucket, mark: str) -> int:
    """Adds `mark` to the list in refs/main by compare-and-swap, as often as it takes; how often it was refused."""
    for refusals in range(10_000):
        try:
            found = bucket.read("refs/main")
            assert found is not None
            marks = json.loads(found.data)
            if mark in marks:
                return refusals
            if bucket.swap("refs/main", json.dumps([*marks, mark]).encode(), found.version) is not None:
                return refusals
        except (RemoteUncertain, RemoteUnreachable):
            continue  # the list tells
    raise AssertionError("no move in 10,000 tries")


def race(bucket: Bucket, writers: int, moves: int) -> int:
    """No move is lost and none is made twice; how many were refused on the way."""
    assert bucket.create("refs/main", b"[]") is not None

    def write(writer: int) -> int:
        return sum(moved(bucket, f"{writer}.{move}") for move in range(moves))

    with ThreadPoolExecutor(writers) as threads:
        refusals = sum(threads.map(write, range(writers)))
    found = bucket.read("refs/main")
    assert found is not None
    marks = json.loads(found.data)
    assert sorted(marks) == sorted(f"{writer}.{move}" for writer in range(writers) for move in range(moves))
    for writer in range(writers):
        own = [int(mark.partition(".")[2]) for mark in marks if mark.startswith(f"{writer}.")]
        assert own == list(range(moves)), "each writer's moves stand in their order"
    return refusals


@pytest.mark.slow("hundreds of requests")
def test_of_many_moves_at_once_none_is_lost_or_doubled(contended: Bucket) -> None:
    assert race(contended, WRITERS, MOVES) > 0, "writers met"


@pytest.mark.slow("hundreds of requests, waits between tries")
def test_nor_where_answers_are_lost(proxy: StoreProxy, shaky: Bucket) -> None:
    proxy.shaken(random.Random(1), 0.2, *NETWORK)
    race(shaky, 4, 8)
    assert proxy.faults["lose"] and proxy.faults["500 made"] and proxy.faults["409"]


def test_of_many_creates_at_once_one_is_first(contended: Bucket) -> None:
    for number in range(3):
        with ThreadPoolExecutor(WRITERS) as threads:
            made = list(threads.map(lambda w, n=number: contended.create(f"refs/{n}", b"%d" % w), range(WRITERS)))
        found = contended.read(f"refs/{number}")
        assert found is not None and [w for w, version in enumerate(made) if version] == [int(found.data)]


@pytest.mark.slow("hundreds of requests")
def test_the_race_notices_a_store_that_lies(localbucket_server: StoreServer) -> None:
    """The negative control of the three above: the same writers lose moves where If-Match is ignored."""
    with pytest.raises(AssertionError):
        for _ in range(5):
            race(open_bucket(localbucket_server.address()), WRITERS, MOVES)


# Conditional writes over a bad network.


def test_a_lost_answer_of_a_create_is_read_back(proxy: StoreProxy, shaky: Bucket) -> None:
    for fault in (
        Fault(lose=True),
        Fault(status=500, made=True),
        Fault(status=503, made=True),
        Fault(cut=0.0, lose=True),
    ):
        key = f"refs/{len(proxy.requests)}"
        proxy.on("PUT", key, fault)
        version, found = shaky.create(key, b"mine"), shaky.read(key)
        assert found is not None and version is not None and found.version.e_tag == version.e_tag
        assert proxy.count("PUT", key) == 1, "it was made, so it was not asked for again"


def test_a_lost_answer_of_a_move_is_read_back(proxy: StoreProxy, shaky: Bucket) -> None:
    version = shaky.create("refs/a", b"0")
    for number, fault in enumerate(
        (Fault(lose=True), Fault(status=500, made=True), Fault(drop=True), Fault(status=503)), 1
    ):
        assert version is not None
        proxy.on("PUT", "refs/a", fault)
        version = shaky.swap("refs/a", b"%d" % number, version)
    found = shaky.read("refs/a")
    assert found is not None and found.data == b"4" and version is not None


def test_a_lost_answer_behind_others_moves_is_uncertain(
    proxy: StoreProxy, shaky: Bucket, moto_server: StoreServer
) -> None:
    """Ours was made, and another continued from it: neither "made" nor "not made" would be true of what is there."""
    first = shaky.create("refs/a", b"one")
    assert first is not None
    proxy.on("PUT", "refs/a", Fault(lose=True))
    proxy.on("GET", "refs/a", Fault(delay_s=0.5))

    def other() -> None:
        direct = open_bucket(moto_server.address(shaky.url.rpartition("/")[2]))
        while (found := direct.read("refs/a")) is None or found.data != b"ours":
            time.sleep(0.01)
        assert direct.swap("refs/a", b"ours, theirs", found.version) is not None

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(RemoteUncertain, match="refs/a"):
        shaky.swap("refs/a", b"ours", first)
    thread.join()


def test_refused_and_concurrent_are_told_apart(proxy: StoreProxy, shaky: Bucket) -> None:
    """412 says that the condition does not hold; 409 only that another write was under way, so it is tried again."""
    for _ in range(2):
        proxy.on("PUT", "refs/", Fault(status=409), times=2)
        first = shaky.create("refs/a", b"one") or shaky.create("refs/b", b"one")
        assert first is not None and proxy.count("PUT", "refs/") == 3
        proxy.on("PUT", "refs/", Fault(status=409), times=2)
        assert shaky.swap("refs/a", b"two", first) is not None and proxy.count("PUT", "refs/") == 6
        assert shaky.create("refs/a", b"three") is None and shaky.swap("refs/a", b"three", first) is None
        assert proxy.count("PUT", "refs/") == 8, "a refusal is believed at once"
        shaky.delete(["refs/a"])
        proxy.calm()


def test_a_store_that_only_refuses_is_an_error_and_no_loop(
    proxy: StoreProxy, shaky: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.2)
    proxy.on("PUT", "refs/", Fault(status=412), times=100)
    begun = time.monotonic()
    with pytest.raises(RemoteError, match="412"):
        shaky.create("refs/a", b"one")
    assert proxy.count("PUT", "refs/") <= 7 and time.monotonic() - begun < 10


# A bad network, for everything else.


def calls(bucket: Bucket) -> dict[str, tuple[str, str, Callable[[], object]]]:
    """Each call with the request that it makes: (method, part of the path, call)."""
    return {
        "read": ("GET", "pack", lambda: bucket.read("pack")),
        "ranges": ("GET", "pack", lambda: bucket.read_ranges("pack", [(0, 10), (3 << 20, 10)])),
        "size": ("HEAD", "pack", lambda: bucket.size("pack")),
        "put": ("PUT", "pack", lambda: bucket.put("pack", bytes(4 << 20))),
        "parts": ("PUT", "large", lambda: bucket.put("large", bytes(20 << 20))),
        "create": ("PUT", "refs", lambda: bucket.create("refs/new", b"new")),
        "swap": ("PUT", "refs", lambda: bucket.swap("refs/a", b"two", bucket.read("refs/a").version)),
        "delete": ("DELETE", "old", lambda: bucket.delete(["old/a", "old/b"])),
        "entries": ("GET", "list-type", lambda: list(bucket.entries("refs"))),
        "now": ("PUT", "clock", bucket.now),
    }


FAILURES = [Fault(status=500), Fault(status=503), Fault(drop=True), Fault(lose=True)]


@pytest.fixture
def filled(shaky: Bucket, proxy: StoreProxy) -> Bucket:
    for key, data in (("pack", bytes(4 << 20)), ("refs/a", b"one"), ("old/a", b"a"), ("old/b", b"b")):
        shaky.put(key, data)
    proxy.calm()
    return shaky


@pytest.mark.slow("waits between tries")
@pytest.mark.parametrize("turn", [0, 2])
def test_what_fails_twice_is_done_all_the_same(proxy: StoreProxy, filled: Bucket, turn: int) -> None:
    for number, (name, (method, part, call)) in enumerate(calls(filled).items(), turn):
        fault = FAILURES[number % len(FAILURES)]
        proxy.calm()
        proxy.on(method, part, fault, times=2)
        begun = time.monotonic()
        call()
        found_at_once = fault.lose and name in ("create", "swap")
        assert proxy.faults[fault.name] == (1 if found_at_once else 2), (name, fault)
        assert time.monotonic() - begun < 10, (name, fault)


@pytest.mark.slow("waits between tries")
def test_what_never_works_is_unreachable_after_a_bounded_time(proxy: StoreProxy, filled: Bucket) -> None:
    """All at once, with three faults by turns."""
    tried = calls(filled)
    for number, (method, part, _) in enumerate(tried.values()):
        proxy.on(method, part, FAILURES[number % 3], times=1000)
    begun = time.monotonic()
    errors = failures(tried)
    assert time.monotonic() - begun < 30
    assert {name: type(error) for name, error in errors.items()} == dict.fromkeys(tried, RemoteUnreachable)
    assert all("tried several times" in str(error) for error in errors.values())
    assert {name for name, error in errors.items() if "may have been made" in str(error)} == {"create", "swap"}


def failures(tried: dict[str, tuple[str, str, Callable[[], object]]]) -> dict[str, BaseException]:
    """What each call raises, made at once."""
    with ThreadPoolExecutor(len(tried)) as threads:
        running = {name: threads.submit(call) for name, (_, _, call) in tried.items()}
        raised = {name: future.exception() for name, future in running.items()}
    return {name: error for name, error in raised.items() if error is not None}


def test_an_answer_that_breaks_off_is_asked_for_again(proxy: StoreProxy, filled: Bucket) -> None:
    for name in ("read", "ranges"):
        method, part, call = calls(filled)[name]
        proxy.on(method, part, Fault(cut=0.5), times=2)
        call()
        assert proxy.faults["cut"] == 2
        proxy.calm()


@pytest.mark.slow("waits for what never comes")
def test_a_store_that_does_not_answer_is_given_up(proxy: StoreProxy, filled: Bucket, moto_server: StoreServer) -> None:
    """A write may be made later: that is said, and the version tells."""
    hasty = open_bucket(moto_server.address(filled.url.rpartition("/")[2], endpoint=proxy.endpoint, timeout_s=1))
    tried = calls(hasty)
    for method, part, _ in tried.values():
        proxy.on(method, part, Fault(delay_s=4.0), times=1000)
    begun = time.monotonic()
    del tried["swap"]  # its read would time out first
    errors = failures(tried)
    assert time.monotonic() - begun < 20
    assert {name: type(error) for name, error in errors.items()} == dict.fromkeys(tried, RemoteUnreachable)
    assert "no answer in time" in str(errors["read"]) and "may have been made" in str(errors["create"])


@pytest.mark.slow("hundreds of requests, waits between tries")
def test_only_our_errors_come_out_of_a_bad_network(proxy: StoreProxy, shaky: Bucket) -> None:
    """And what a call says that it did is so."""
    dice = random.Random(7)
    proxy.shaken(dice, 0.35, *NETWORK, Fault(status=412), Fault(status=400), Fault(status=403))
    kept: dict[str, bytes] = {}
    errors = 0
    for number in range(60):
        key, data = f"packs/{number % 7}", os.urandom(dice.randrange(1, 50_000))
        try:
            shaky.put(key, data)
            kept[key] = data
            found = shaky.read(key)
            assert found is not None and found.data == data
            part = shaky.read_ranges(key, [(len(data) // 2, len(data) - len(data) // 2)])
            assert bytes(part[0]) == data[len(data) // 2 :]
            list(shaky.entries("packs"))
            shaky.size(key)
        except ThawError as error:
            assert isinstance(error, RemoteError) and "127.0.0.1" not in str(error)
            kept.pop(key, None)
            errors += 1
    proxy.calm()
    for key, data in kept.items():
        found = shaky.read(key)
        assert found is not None and found.data == data
    assert errors and kept


def test_waits_between_tries_are_spread_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert [len(list(attempts(12, deadline_s=1e9))) for _ in range(20)] == [12] * 20
    assert all(0 <= wait <= LONGEST_WAIT_S for wait in waits) and len(set(waits)) > 200
    assert len(list(attempts(12, deadline_s=0.0))) == 1


# Stores that cannot be used, and keys that may not.


@pytest.mark.parametrize("store", ["folder", "moto_server", *STORES])
def test_the_probe_passes_what_keeps_its_word_and_leaves_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, store: str
) -> None:
    server = None if store == "folder" else request.getfixturevalue(store)
    bucket = open_bucket(server.address() if server else parse((tmp_path / "bucket").as_uri()))
    probe(bucket)
    assert list(bucket.entries("")) == []


def test_a_probe_that_cannot_ask_says_what_it_was_for(store_keys: None) -> None:
    nobody = parse("s3://abc/x", {"endpoint": f"http://127.0.0.1:{free_port()}", "timeout_s": 1})
    with pytest.raises(RemoteUnreachable, match=r"before its first push here .* no connection"):
        probe(open_bucket(nobody))


def test_the_probe_refuses_a_store_that_ignores_if_match(localbucket_server: StoreServer) -> None:
    bucket = open_bucket(localbucket_server.address("team"))
    with pytest.raises(RemoteUnsafe, match=f"s3://{BUCKET}/team .*version it no longer has was allowed"):
        probe(bucket)
    assert list(bucket.entries("")) == []


def test_the_probe_refuses_a_google_bucket_that_ignores_generations(
    localbucket_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of `gs://`, and all of it that is tested: no server that takes `x-goog-if-generation-match`
    is among the test servers. Data goes there and back; branches are refused."""
    key = {"gcs_base_url": localbucket_server.endpoint, "disable_oauth": True}
    key |= {name: "" for name in ("client_email", "private_key", "private_key_id")}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    bucket = open_bucket(parse(f"gs://{BUCKET}/team", {"endpoint": localbucket_server.endpoint}))
    bucket.put("packs/a", b"0123456789")
    assert [bytes(part) for part in bucket.read_ranges("packs/a", [(2, 3)])] == [b"234"]
    with pytest.raises(RemoteUnsafe, match=f"gs://{BUCKET}/team .*creating an object that exists was allowed"):
        probe(bucket)
    bucket.delete(["packs/a"])
    assert list(bucket.entries("")) == []


@pytest.mark.parametrize(
    ("header", "said"),
    [("if-none-match", "creating an object that exists was allowed"), ("if-match", "no longer has was allowed")],
)
def test_the_probe_refuses_what_is_allowed_without_condition(
    proxy: StoreProxy, shaky: Bucket, header: str, said: str
) -> None:
    proxy.on("PUT", "probe/", Fault(without=(header,)), times=100)
    with pytest.raises(RemoteUnsafe, match=said):
        probe(shaky)


def test_the_probe_refuses_what_is_made_and_called_refused(proxy: StoreProxy, shaky: Bucket) -> None:
    """The second write is made without its condition, and answered with 412."""
    proxy.on("PUT", "probe/", Fault())
    proxy.on("PUT", "probe/", Fault(without=("if-none-match",), status=412, made=True))
    with pytest.raises(RemoteUnsafe, match="creating an object that exists was allowed"):
        probe(shaky)


def test_the_probe_refuses_a_cache_before_the_store(tmp_path: Path) -> None:
    class CachedFolder(FolderBucket):
        """Conditions hold, and reads give what was read first."""

        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.behind, self.cache = FolderBucket(root), dict[str, FoundObject | None]()

        def read(self, key: str) -> FoundObject | None:
            return self.cache.setdefault(key, self.behind.read(key))

        def create(self, key: str, data: bytes) -> Version | None:
            return self.behind.create(key, data)

        def swap(self, key: str, data: bytes, expected: Version) -> Version | None:
            return self.behind.swap(key, data, expected)

    with pytest.raises(RemoteUnsafe, match="other bytes than those written last"):
        probe(CachedFolder(tmp_path))


@STARTS
def test_a_key_that_may_only_read_reads(seaweed_server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    address = seaweed_server.address()
    writer = open_bucket(address)
    writer.put("packs/a", b"data")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    reader = open_bucket(address)
    found = reader.read("packs/a")
    assert found is not None and found.data == b"data" and reader.read("packs/b") is None
    assert bytes(reader.read_ranges("packs/a", [(1, 2)])[0]) == b"at" and [e.key for e in reader.entries("")] == [
        "packs/a"
    ]
    refused: list[Callable[[], object]] = [
        lambda: reader.put("packs/b", b""), lambda: reader.create("refs/a", b"1"),
        lambda: reader.swap("packs/a", b"1", found.version), lambda: reader.delete(["packs/a"]), reader.now,
        lambda: probe(reader),
    ]  # fmt: skip
    for call in refused:
        with pytest.raises(RemoteDenied, match="lack this right"):
            call()
    assert writer.read("packs/a") == found and {e.key for e in writer.entries("")} == {"packs/a"}


@STARTS
def test_wrong_keys_are_denied_and_never_shown(seaweed_server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    bucket = open_bucket(seaweed_server.address())
    for call in (lambda: bucket.read("a"), lambda: bucket.put("a", b""), lambda: bucket.create("a", b"1")):
        with pytest.raises(RemoteDenied) as caught:
            call()
        shown = repr(caught.value) + repr(caught.value.__cause__) + repr(vars(bucket))
        assert "a-wrong-secret" not in shown and os.environ["AWS_ACCESS_KEY_ID"] not in shown
        assert caught.value.__context__ is None or caught.value.__suppress_context__, "its text holds whole URLs"


@STARTS
def test_keys_come_from_a_profile(seaweed_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "credentials"
    keys.write_text(f"[team]\naws_access_key_id = {READER[0]}\naws_secret_access_key = {READER[1]}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(RemoteDenied, match="no credentials for s3://"):
        open_bucket(seaweed_server.address())
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    assert open_bucket(seaweed_server.address(profile="team")).read("a") is None
    with pytest.raises(RemoteDenied, match="no profile 'nobody'"):
        open_bucket(seaweed_server.address(profile="nobody"))
    settings = tmp_path / "config"
    settings.write_text(
        "[profile expired]\nsso_session = team\nsso_account_id = 123456789012\nsso_role_name = writer\n"
        "[sso-session team]\nsso_region = us-east-1\nsso_start_url = https://team.invalid/start\n"
        "[profile broken]\ncredential_process = /bin/false\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(settings))
    with pytest.raises(RemoteDenied, match=r"SSOTokenLoadError.* \(aws sso login\)"):
        open_bucket(seaweed_server.address(profile="expired")).read("a")
    with pytest.raises(RemoteDenied, match="CredentialRetrievalError"):
        open_bucket(seaweed_server.address(profile="broken"))


@pytest.mark.parametrize("store", ["moto_server", pytest.param("azurite_server", marks=STARTS)])
def test_a_bucket_that_is_not_there_is_named(request: pytest.FixtureRequest, store: str) -> None:
    server: StoreServer = request.getfixturevalue(store)
    address = parse(f"{server.scheme}://no-such-bucket/team", dict(server.address().options))
    bucket = open_bucket(address)
    for call in (
        lambda: bucket.read("a"), lambda: bucket.put("a", b""), lambda: bucket.create("a", b""), bucket.now,
        lambda: list(bucket.entries("")), lambda: bucket.read_ranges("a", [(0, 1)]),
    ):  # fmt: skip
        with pytest.raises(RemoteMissing, match=r"://no-such-bucket/team: .*no such bucket"):
            call()


# Options.


def test_a_private_certificate_is_trusted_by_its_file_alone(moto_server: StoreServer, tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    with proxied(moto_server.endpoint, free_port(), certificate) as proxy:
        address = moto_server.address(endpoint=proxy.endpoint, ca_file=str(certificate))
        bucket = open_bucket(address)
        bucket.put("a", b"over TLS")
        found = bucket.read("a")
        assert found is not None and found.data == b"over TLS"
        with pytest.raises(RemoteUnreachable, match="no connection"):
            open_bucket(moto_server.address(endpoint=proxy.endpoint)).read("a")


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, in one PEM file."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_encryption_by_the_store_is_asked_for_with_each_write(proxy: StoreProxy, moto_server: StoreServer) -> None:
    bucket = open_bucket(moto_server.address(endpoint=proxy.endpoint, sse="aws:kms", sse_kms_key_id="a-key"))
    bucket.put("a", b"1")
    bucket.create("b", b"1")
    writes = [asked.headers for asked in proxy.requests if asked.method == "PUT"]
    assert len(writes) == 2
    for headers in writes:
        assert headers["x-amz-server-side-encryption"] == "aws:kms"
        assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == "a-key"


def test_encryption_by_a_key_of_ones_own_comes_from_the_environment(
    proxy: StoreProxy, moto_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = base64.b64encode(b"k" * 32).decode()
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "sse-c")
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY_BASE64", key)
    bucket = open_bucket(moto_server.address(endpoint=proxy.endpoint))
    bucket.put("a", b"1")
    assert bucket.read("a") is not None
    assert [asked.headers["x-amz-server-side-encryption-customer-key"] for asked in proxy.requests] == [key, key]


def test_path_style_decides_where_the_bucket_stands(
    proxy: StoreProxy, moto_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_bucket(moto_server.address("x", endpoint=proxy.endpoint)).read("a")
    assert proxy.requests[-1].path == f"/{BUCKET}/x/a"
    monkeypatch.setenv("http_proxy", proxy.endpoint)  # the name below is nobody's: only a proxy is asked for it
    open_bucket(moto_server.address("x", endpoint="http://store.invalid", path_style=False)).read("a")
    assert proxy.requests[-1].path == f"http://{BUCKET}.store.invalid/x/a"
    assert proxy.requests[-1].headers["host"] == f"{BUCKET}.store.invalid"


@pytest.mark.parametrize(
    ("url", "form"),
    [
        ("s3://abc", "s3://abc"), ("s3://abc/", "s3://abc"), ("s3://abc/a/b/", "s3://abc/a/b"),
        ("file:///tmp/x/", "file:///tmp/x"), ("file://localhost/tmp/x", "file:///tmp/x"),
        ("file:///tmp/a%20b", "file:///tmp/a%20b"), ("az://abc/x", "az://abc/x"), ("gs://abc/x", "gs://abc/x"),
    ],
)  # fmt: skip
def test_an_address_has_one_form(url: str, form: str) -> None:
    address = parse(url)
    assert address.url == form and parse(address.url) == address


def test_options_get_their_types() -> None:
    given = {"path_style": "yes", "timeout_s": "5", "endpoint": " http://127.0.0.1:1 "}
    assert parse("s3://abc", given).options == {"path_style": True, "timeout_s": 5, "endpoint": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("s3://key:hidden@abc/x", {}, "more than a bucket"),
        ("az://abc/x?sig=hidden", {}, "more than a bucket"),
        ("s3://abc#hidden", {}, "more than a bucket"),
        ("s3://abc", {"aws_secret_access_key": "hidden"}, "would store a credential"),
        ("az://abc", {"sas_token": "hidden"}, "would store a credential"),
        ("s3://abc", {"endpoint": "https://user:hidden@host"}, "a user, a query"),
        ("s3://abc", {"endpoint": "https://host/?sig=hidden"}, "a user, a query"),
        ("ftp://abc/x", {}, "does not know"),
        ("/tmp/x", {}, "a remote's URL is"),
        ("s3://ab", {}, "not one"),
        ("s3://ABC", {}, "not one"),
        ("s3://abc/../x", {}, "cannot be used"),
        ("file:///", {}, "no folder of a remote's own"),
        ("file:///a/../b", {}, "no folder of a remote's own"),
        ("file://host/a", {}, "no folder from the root"),
        ("file:///a", {"region": "x"}, "takes: none"),
        ("s3://abc", {"regoin": "x"}, "it takes: anonymous"),
        ("s3://abc", {"path_style": "maybe"}, "true or false"),
        ("s3://abc", {"timeout_s": "soon"}, "a whole number"),
        ("s3://abc", {"timeout_s": 0}, "1 to 3600"),
        ("s3://abc", {"sse": "rot13"}, "one of AES256"),
        ("s3://abc", {"endpoint": "127.0.0.1:9000"}, "neither http"),
        ("s3://abc", {"endpoint": "https://x y"}, "more or less than"),
        ("s3://abc", {"endpoint": "http://:80"}, "more or less than"),
        ("s3://key:hidden/x", {}, "more than a bucket"),
        ("s3://key%3Ahidden%40abc/x", {}, "more than a bucket"),
        ("s3://[hidden/x", {}, "cannot be one"),
        ("s3://abc", {"endpoint": "https://host/#hidden"}, "a user, a query"),
        # the store's client panics at these, when it is first used
        ("s3://abc", {"endpoint": "http://host:65536"}, "a host or a port that cannot be one"),
        ("s3://abc", {"endpoint": "http://[1]:80"}, "a host or a port that cannot be one"),
        ("s3://abc", {"endpoint": "http://256.1.1.1"}, "no name and no address"),
        ("s3://abc", {"endpoint": "http://10.0.0"}, "no name and no address"),
        ("s3://abc", {"endpoint": "http://host.0x1:9"}, "no name and no address"),
        ("s3://abc", {"endpoint": "http://xn--.org"}, "no name and no address"),
    ],
)
def test_what_cannot_be_an_address_is_refused(url: str, options: dict[str, str | int | bool], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        parse(url, options)
    assert "hidden" not in str(caught.value)


def test_what_only_the_store_can_tell_is_refused_when_it_is_opened(
    store_keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="lacks the storage account"):
        open_bucket(parse("az://abc"))
    for address in ("http://127.0.0.1:9", "http://[::1]:9"):
        with pytest.raises(InvalidRequest, match="leave path_style out"):
            open_bucket(parse("s3://abc", {"endpoint": address, "path_style": False}))
        open_bucket(parse("s3://abc", {"endpoint": address}))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no host")
    with pytest.raises(InvalidRequest, match="more or less than"):
        open_bucket(parse("s3://abc"))


def test_a_certificate_file_must_be_one(store_keys: None, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not one")
    (tmp_path / "odd.pem").write_text("-----BEGIN CERTIFICATE-----\nodd\n-----END CERTIFICATE-----\n")
    for name, said in (("ca.pem", "no certificate"), ("none.pem", "cannot be read"), ("odd.pem", "can be read")):
        with pytest.raises(InvalidRequest, match=said):
            open_bucket(parse("s3://abc", {"ca_file": str(tmp_path / name)}))


# A folder.


def test_a_folder_is_this_users_alone(tmp_path: Path) -> None:
    bucket = FolderBucket(tmp_path / "deep" / "bucket")
    bucket.put("packs/1/a", b"data")
    bucket.create("refs/a", b"1")
    for path in (tmp_path / "deep").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    """No lock is taken and nothing is made: not even the folder itself."""
    assert FolderBucket(tmp_path / "none").read("refs/a") is None and not (tmp_path / "none").exists()
    FolderBucket(tmp_path / "bucket").put("refs/a", b"1")
    (tmp_path / "bucket" / ".tmp").rmdir()
    reader = FolderBucket(tmp_path / "bucket")
    assert reader.read("refs/a") is not None and reader.size("refs/a") == 1
    assert [entry.key for entry in reader.entries("")] == ["refs/a"] and bytes(
        reader.read_ranges("refs/a", [(0, 1)])[0]
    ) == b"1"
    assert [path.name for path in (tmp_path / "bucket").iterdir()] == ["refs"]


def test_a_write_to_a_folder_is_on_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves hangs on this order: the bytes, the name, the folder that holds it. A kill shows none."""
    done: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def synced(fd: int) -> None:
        fsync(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        done.append(("synced", path if path.parent.name != ".tmp" else path.parent / "it"))

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        done.append(("renamed", target))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    root = tmp_path / "bucket"
    bucket = FolderBucket(root)
    refs, order = root / "refs", [("synced", root / ".tmp" / "it"), ("renamed", root / "refs" / "a")]
    bucket.put("refs/a", b"1")
    assert done == [("synced", tmp_path), ("synced", root), order[0], ("synced", root), order[1], ("synced", refs)]
    found = bucket.read("refs/a")
    assert found is not None
    for write in (lambda: bucket.put("refs/a", b"1"), lambda: bucket.swap("refs/a", b"2", found.version)):
        done.clear()
        write()
        assert done == [*order, ("synced", refs)]
    bucket.delete(["refs/a"])
    done.clear()
    bucket.create("refs/a", b"3")
    assert done == [*order, ("synced", refs)]


def test_a_folder_that_is_locked_for_long_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "LOCK_WAIT_S", 0.1)
    bucket = FolderBucket(tmp_path / "bucket")
    bucket.put("a", b"1")
    with FolderBucket(tmp_path / "bucket")._locked(), pytest.raises(Busy, match="locked by another process"):
        bucket.create("refs/a", b"1")
    assert bucket.create("refs/a", b"1") is not None


@pytest.mark.slow("kills many processes")
def test_a_folder_survives_kills_at_any_point(tmp_path: Path, kills: int = KILLS) -> None:
    """What returned is there, whole; what did not is there whole or not at all; nobody waits for the dead."""
    root, dice = tmp_path / "bucket", random.Random(11)
    kept: dict[str, int] = {}
    last, midst = (-1, ""), 0
    for _ in range(kills):
        said = killed(root, dice)
        bucket, pending = FolderBucket(root), None
        for word, *rest in said:
            if word == "put":
                kept[rest[0]] = int(rest[1])
            elif word == "moving":
                pending = (int(rest[0]), rest[1])
            elif word == "moved":
                last, pending = (int(rest[0]), rest[1]), None
        found = bucket.read("refs/main")
        value = (int(found.data.split()[0]), found.data.split()[1].decode()) if found else (-1, "")
        assert value == last or (pending is not None and value == pending)
        last, midst = value, midst + (pending is not None)
        for entry in bucket.entries("packs"):
            data = bucket.read(entry.key)
            assert data is not None and data.data == entry.key.encode() * (entry.size // len(entry.key))
            assert kept.get(entry.key, entry.size) == entry.size
        assert {entry.key for entry in bucket.entries("packs")} >= kept.keys()
    FolderBucket(root).put("last", b"")
    assert list((root / ".tmp").iterdir()) == [], "the next writer removes what the killed ones left"
    assert len(kept) > kills and last[0] > 0


def killed(root: Path, dice: random.Random) -> list[list[str]]:
    """What a writer said until it was killed."""
    command = [sys.executable, str(Path(__file__).with_name("folder_child.py")), str(root), str(dice.random())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as child:
        assert child.stdout is not None and child.stdout.readline() == b"open\n"
        time.sleep(dice.random() ** 2 * 0.3)
        child.send_signal(signal.SIGKILL)
        said, errors = child.communicate()
        assert child.returncode == -signal.SIGKILL, errors[-2000:]
    return [line.split() for line in said.decode().split("\n")[:-1]]
