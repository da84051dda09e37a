"""Folders that nobody else can have put anything into."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from thaw.core.errors import StorageFailed
from thaw.data.private import is_own, make_private

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder as /tmp is."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.lstat().st_mode)


def test_all_that_is_made_is_for_its_owner_only_whatever_the_umask(shared: Path, umask: int) -> None:
    make_private(shared / "a" / "b" / "c")
    assert [mode(shared / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3
    make_private(shared / "a" / "b" / "c")
    assert mode(shared) == 0o1777


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("bits", [0o777, 0o770, 0o720])
def test_what_others_may_have_written_to_is_refused(shared: Path, bits: int, close: bool) -> None:
    folder = shared / "open"
    folder.mkdir()
    folder.chmod(bits)
    with pytest.raises(StorageFailed, match=rf"open to others \(mode {bits:04o}\).*chmod 700"):
        make_private(folder, close=close)
    with pytest.raises(StorageFailed, match=rf"others may write to .*open \(mode {bits:04o}\).*chmod go-w"):
        make_private(folder / "inner", close=close)
    assert list(folder.iterdir()) == [] and mode(folder) == bits


def test_what_others_may_only_read_is_closed_where_thaw_named_it(shared: Path) -> None:
    folder = shared / "readable"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(StorageFailed, match="open to others"):
        make_private(folder)
    assert mode(folder) == 0o755, "somebody's own folder is not changed"
    make_private(folder, close=True)
    assert mode(folder) == 0o700


def test_the_way_may_be_read_by_others(shared: Path) -> None:
    (shared / "home").mkdir()
    (shared / "home").chmod(0o755)
    make_private(shared / "home" / "mail")
    assert mode(shared / "home") == 0o755


@as_root
@pytest.mark.parametrize("bits", [0o700, 0o755, 0o1777])
def test_what_another_user_owns_is_refused_as_the_folder_and_on_its_way(shared: Path, bits: int) -> None:
    folder = shared / "theirs"
    folder.mkdir()
    folder.chmod(bits)
    os.chown(folder, NOBODY, NOBODY)
    for wanted in (folder, folder / "inner", folder / "a" / "b"):
        with pytest.raises(StorageFailed, match=rf"theirs belongs to another user \(uid {NOBODY}, not 0\)"):
            make_private(wanted, close=True)
    assert list(folder.iterdir()) == [] and not is_own(folder)


@pytest.mark.parametrize("where", ["the folder", "on its way", "to nowhere"])
def test_a_symbolic_link_is_refused(shared: Path, where: str) -> None:
    target = shared / "target"
    target.mkdir(mode=0o700)
    link = shared / "link"
    link.symlink_to(shared / "nowhere" if where == "to nowhere" else target)
    if os.getuid() == 0:
        os.lchown(link, NOBODY, NOBODY)
    with pytest.raises(StorageFailed, match="is a symbolic link: name the folder that is meant"):
        make_private(link / "mail" if where == "on its way" else link, close=True)
    assert list(target.iterdir()) == [] and not (shared / "nowhere").exists()


@as_root
def test_roots_own_links_lead_to_a_way_that_is_looked_at_as_well(shared: Path) -> None:
    real = shared / "real"
    real.mkdir(mode=0o755)
    (shared / "run").symlink_to(real)
    make_private(shared / "run" / "mail")
    assert mode(real / "mail") == 0o700
    real.chmod(0o777)
    with pytest.raises(StorageFailed, match="others may write to"):
        make_private(shared / "run" / "another")


def test_a_file_in_its_place_is_named(shared: Path) -> None:
    (shared / "file").write_text("")
    with pytest.raises(StorageFailed, match="is not a folder"):
        make_private(shared / "file")
    with pytest.raises(StorageFailed, match="file is not a folder"):
        make_private(shared / "file" / "inner")
