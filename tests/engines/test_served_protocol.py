"""What a message to an engine says of itself."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from thaw.core.errors import CorruptBlob, EngineDied, InvalidRequest, StorageFailed, ThawError
from thaw.data.tiers.folder import folder_mount
from thaw.engines.served.mailbox import SCHEDULER, Mailbox, default_folder
from thaw.engines.served.protocol import Answer, Message, Switch, Unpin, Write


def write(**changes: object) -> Write:
    return Write(**{"id": "0" * 32, "record": "a" * 32, "store": "s", "packs": ("p0", "p1"), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_kv", "end"), [(None, 100), (100, 100), (60, 60), (0, 0)])
def test_a_capture_ends_where_it_is_told_or_where_the_record_does(num_kv: int | None, end: int) -> None:
    assert write(num_kv=num_kv).end(100, 2) == end


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_kv": 101}, "capture of 101 tokens: the session has KV for 100"),
        ({"base": 101}, "capture from token 101: the session has KV for 100 tokens"),
        ({"num_kv": 60, "base": 61}, "capture from token 61: the session has KV for 60 tokens"),
        ({"packs": ("p0",)}, "1 packs for 2 ranks"),
    ],
)
def test_what_cannot_be_written_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        write(**changes).end(100, 2)


@pytest.mark.parametrize("message", [Switch(id="0" * 32, on=False), Unpin(id="0" * 32)])
def test_what_is_about_everybodys_sessions_needs_a_grant_in_the_mail(message: Message, tmp_path: Path) -> None:
    mail = Mailbox(tmp_path)
    with pytest.raises(InvalidRequest, match="share the engine's mail folder"):
        mail.require_granted(message)
    mail.grant("1" * 32)
    with pytest.raises(InvalidRequest, match="share the engine's mail folder"):
        mail.require_granted(message)
    mail.grant(message.id)
    mail.require_granted(message)


def test_what_is_about_ones_own_session_needs_none(tmp_path: Path) -> None:
    Mailbox(tmp_path).require_granted(write())


def test_mail_is_for_its_owner_only(tmp_path: Path) -> None:
    mail = Mailbox(tmp_path / "mail")
    mail.answer("0" * 32, SCHEDULER, Answer())
    mail.grant("0" * 32)
    mail.register_store(folder_mount("0" * 32, tmp_path))
    mail.expect_entropies("0" * 32)
    for path in mail.folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("umask", [0o000, 0o022], ids=oct)
def test_every_folder_of_the_usual_place_is_for_its_owner_only(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    before = os.umask(umask)
    try:
        folder = Mailbox(default_folder("one") / "dp0").folder
    finally:
        os.umask(before)
    made = [folder, *folder.parents][: len(folder.relative_to(runtime).parts)]
    assert [stat.S_IMODE(place.stat().st_mode) for place in made] == [0o700] * 3
    for place in made:
        place.chmod(0o755)  # as earlier releases left them
    Mailbox(folder)
    assert [stat.S_IMODE(place.stat().st_mode) for place in made] == [0o700] * 3
    made[1].chmod(0o777)
    with pytest.raises(StorageFailed, match=r"the mail folder .*dp0 cannot be used: .* open to others"):
        Mailbox(folder)


@pytest.mark.parametrize("runtime", ["", "relative", "another user's", "not there"])
def test_a_runtime_folder_that_is_not_ours_is_not_used(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"": "", "relative": ".", "another user's": "/", "not there": str(tmp_path / "gone")}[runtime]
    if named == "/" and os.getuid() == 0:
        os.chown(tmp_path, 65534, 65534)
        named = str(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", named)
    assert default_folder("one") == Path("/tmp") / f"thaw-{os.getuid()}" / "thaw-mail" / "one"


def test_entropies_come_by_mail_where_they_are_expected(tmp_path: Path) -> None:
    """Of each token the last one that was said: a step may run again."""
    mail, name = Mailbox(tmp_path / "mail"), "0" * 32
    mail.put_entropy(name, 0, 1.0)
    with pytest.raises(StorageFailed, match="cannot be read"):
        mail.entropies(name, 0, 1)
    mail.expect_entropies(name)
    for index, value in enumerate((9.0, 0.1, 2.5, 3.0)):
        mail.put_entropy(name, index, value)
    mail.put_entropy(name, 0, 1.0 / 3.0)
    assert mail.entropies(name, 0, 2) == (1.0 / 3.0, 0.1) and mail.entropies(name, 2, 2) == (2.5, 3.0)
    with pytest.raises(StorageFailed, match=r"tokens up to 5 .* 1 of the last 2"):
        mail.entropies(name, 3, 2)
    mail.drop_entropies(name)
    mail.put_entropy(name, 4, 1.0)
    assert not list((mail.folder / "entropies").iterdir())


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("/nonexistent/x"),
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_file_in_the_mail_is_named_and_nobody_waits_for_it(kind: str, tmp_path: Path) -> None:
    mail = Mailbox(tmp_path / "mail")
    name, store = "1" * 32, "3" * 32
    for place in ("facts/lock", f"facts/{SCHEDULER}", f"stores/{store}", f"plans/{name}", f"answers/{name}.s"):
        ODD_FILES[kind](mail.folder / place)
    for tried in (mail.claim, lambda: mail.register_store(folder_mount(store, tmp_path))):
        with pytest.raises(StorageFailed, match="is no file but a folder, a link, a pipe or a socket"):
            tried()
    assert mail.engine_facts() is None
    for read in (lambda: mail.mount(store), lambda: mail.plan(name), lambda: mail.peek(name, SCHEDULER)):
        try:
            assert read() is None
        except ThawError:
            continue
    with pytest.raises(EngineDied):
        mail.check_alive()
    mail.answer(name, SCHEDULER, Answer())


@pytest.mark.parametrize("what", ["answers", "plans"])
def test_mail_that_says_nothing_is_named(what: str, tmp_path: Path) -> None:
    mail, name = Mailbox(tmp_path / "mail"), "1" * 32
    (mail.folder / "answers" / f"{name}.s").write_bytes(b"{")
    (mail.folder / "plans" / name).write_bytes(b"{")
    with pytest.raises(CorruptBlob, match=f"the {what[:-1]} {name}.* is none"):
        mail.peek(name, SCHEDULER) if what == "answers" else mail.plan(name)
