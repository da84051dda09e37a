"""A mark says why; a receipt of the soak is of the code as it stands."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from code_digest import digest_of
from soak_receipts import FOLDER, ROOT, Unclear, commands, groups, main, problems, suites
from thaw import receipt as r
from thaw.receipt import compute

pytest_plugins = ["pytester"]

SOAK = """
import pytest

@pytest.mark.soak("kills", receipt="kills")
@pytest.mark.parametrize("how", ["soon", "late"])
def test_a_kill(how, soak_receipt):
    soak_receipt(what="a process killed", held="nothing was lost", counts={"kills": 2})

class TestOnceMore:
    @pytest.mark.longer_in_soak("twice as long", receipt="longer")
    def test_the_law(self):
        pass
"""
STORE = "def write(blob):\n    return len(blob) + 1\n"


@pytest.fixture
def tree(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with two receipts to be: of src/thaw/store, src/thaw/data and the tests."""
    pytester.makeini("[pytest]\nmarkers =\n  slow\n  model\n  all_cores\n  soak\n  longer_in_soak\n")
    monkeypatch.setenv("THAW_SOAK", "1")
    for name in ("THAW_RECEIPTS_DIR", "THAW_SUITE"):
        monkeypatch.delenv(name, raising=False)
    put(pytester.path, {"src/thaw/store/packs.py": STORE, "src/thaw/data/a.bin": "x", "tests/store/test_a.py": SOAK})
    return pytester


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def run(tree: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    plugins = ("-p", "tiers", "-p", "soak_writer", "-p", "no:cacheprovider")
    return tree.runpytest_inprocess("-q", *plugins, *(arguments or ("tests",)))


def wrong(tree: pytest.Pytester) -> dict[str, str]:
    return problems(tree.path, groups(tree.path))


def kept(tree: pytest.Pytester) -> set[str]:
    return {path.stem for path in (tree.path / FOLDER).glob("*.json")}


# --- tiers


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("slow", "does not say why"),
        ('slow("")', "does not say why"),
        ("model", "does not say why"),
        ("all_cores", "does not say why"),
        ('soak("why")', "does not name the receipt"),
        ('longer_in_soak(receipt="a")', "does not say why"),
    ],
)
def test_a_mark_without_its_reason_or_receipt_is_refused_by_name(tree: pytest.Pytester, mark: str, said: str) -> None:
    text = f"import pytest\n@pytest.mark.{mark}\ndef test_x():\n    pass\ndef test_y():\n    pass\n"
    found = run_alone(tree, text)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(f"ERROR: test_b.py::test_x: the mark {mark.partition('(')[0]} {said}*")
    found.stderr.no_fnmatch_line("*test_y*")


def run_alone(tree: pytest.Pytester, text: str, *arguments: str) -> pytest.RunResult:
    put(tree.path, {"test_b.py": text})
    return tree.runpytest_inprocess("-q", "-p", "tiers", "-p", "no:cacheprovider", *arguments, "test_b.py")


def test_the_real_model_marks_a_test_by_itself(tree: pytest.Pytester) -> None:
    text = """
import pytest
@pytest.fixture
def demo_model(): pass
def test_real(demo_model): pass
def test_plain(): pass
"""
    out = run_alone(tree, text, "--collect-only", "-m", "model").outlines
    assert [line for line in out if line.startswith("test_b.py")] == ["test_b.py::test_real"]


# --- receipts of the soak


def test_a_receipt_is_written_once_all_of_its_tests_have_passed(tree: pytest.Pytester) -> None:
    assert wrong(tree) == {"kills": "there is none", "longer": "there is none"}
    assert run(tree).ret == 0 and wrong(tree) == {} and main([], tree.path) == 0
    kills, longer = (r.read(tree.path / FOLDER / f"{name}.json") for name in ("kills", "longer"))
    assert [(arm.name, arm.rounds[0].values) for arm in kills.arms] == [
        ("tests", {"passed": 2.0}), ("counts", {"kills": 2.0})
    ]  # fmt: skip
    assert kills.notes[:2] == ("What was run: a process killed.", "What held: nothing was lost.")
    assert longer.arms[0].rounds[0].values == {"passed": 1.0}
    assert longer.command.endswith(" tests/store/test_a.py::TestOnceMore::test_the_law")


def test_a_receipt_that_a_test_makes_itself_is_kept_with_what_it_covers(tree: pytest.Pytester) -> None:
    run(tree)
    own = msgspec.structs.replace(r.read(tree.path / FOLDER / "longer.json"), kind="bench.own")
    made = f"r.read({r.dumps(msgspec.structs.replace(own, digest=compute.digest_of(own)))!r})"
    text = SOAK.replace('what="a process killed", held="nothing was lost", counts={"kills": 2}', f"made={made}")
    text = f"from thaw import receipt as r\n{text}"
    put(tree.path, {"tests/store/test_a.py": text})
    assert set(wrong(tree)) == {"kills", "longer"}
    assert run(tree).ret == 0 and wrong(tree) == {}
    assert r.read(tree.path / FOLDER / "kills.json").parameters["name"] == "longer"


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (("-k", "not late"), {"longer"}),
        (("tests/store/test_a.py::test_a_kill",), {"kills"}),
        (("tests/store/test_a.py::test_a_kill[soon]",), set()),
        (("tests/store/test_a.py::TestOnceMore",), {"longer"}),
    ],
)
def test_a_run_that_leaves_tests_out_leaves_no_receipt_of_them(
    tree: pytest.Pytester, arguments: tuple[str, ...], written: set[str]
) -> None:
    assert run(tree, *arguments).ret == 0
    assert kept(tree) == written


def test_a_receipt_is_of_the_tests_that_left_it(tree: pytest.Pytester) -> None:
    """A test that joins those of a receipt has not been run for it; nor is another receipt's copy its own."""
    run(tree)
    put(tree.path, {"tests/store/test_a.py": SOAK.replace('"kills", receipt="kills"', '"kills", receipt="longer"')})
    assert wrong(tree)["longer"].startswith("it is of other tests: ") and "longer" in kept(tree)
    put(tree.path, {"tests/store/test_a.py": SOAK})
    assert wrong(tree) == {}
    (tree.path / FOLDER / "kills.json").write_bytes((tree.path / FOLDER / "longer.json").read_bytes())
    assert wrong(tree)["kills"].startswith("it is of other tests: ")


def test_a_group_whose_tests_are_skipped_leaves_no_receipt(tree: pytest.Pytester) -> None:
    skipping = SOAK.replace(
        "how, soak_receipt):", 'how, soak_receipt):\n    how == "late" and pytest.skip("not today")'
    )
    put(tree.path, {"tests/store/test_a.py": skipping})
    run(tree).stdout.fnmatch_lines("no receipt kills: 1 of its tests were skipped")
    assert kept(tree) == {"longer"}


@pytest.mark.parametrize(("names", "written"), [(range(21), {"kills", "longer"}), (range(20), {"longer"})])
def test_one_of_twenty_one_may_be_skipped(tree: pytest.Pytester, names: range, written: set[str]) -> None:
    skipping = SOAK.replace("soak_receipt):", 'soak_receipt):\n    how == "7" and pytest.skip("not that one")')
    listed = str([*map(str, names)])
    assert listed not in skipping and '["soon", "late"]' in skipping
    put(tree.path, {"tests/store/test_a.py": skipping.replace('["soon", "late"]', listed)})
    run(tree)
    assert kept(tree) == written


def test_a_mark_that_lint_cannot_read_is_refused(tree: pytest.Pytester) -> None:
    hidden = SOAK.replace("import pytest", "import pytest\nfrom pytest import mark", 1).replace(
        '@pytest.mark.soak("kills", receipt="kills")', '@mark.soak("kills", receipt="kills")'
    )
    put(tree.path, {"tests/store/test_a.py": hidden})
    said = run(tree)
    assert said.ret == pytest.ExitCode.USAGE_ERROR
    said.stderr.fnmatch_lines("*lint does not see it*")


def test_a_run_that_fails_leaves_no_receipt_and_says_so(tree: pytest.Pytester) -> None:
    put(tree.path, {"tests/store/test_a.py": SOAK.replace("        pass", "        assert False")})
    run(tree).stdout.fnmatch_lines("no receipt longer: of its tests 1 failed")
    assert kept(tree) == {"kills"}


def test_a_run_during_which_the_code_was_changed_leaves_no_receipt(tree: pytest.Pytester) -> None:
    change = f"open({str(tree.path / 'src/thaw/data/a.bin')!r}, 'a').write('y')"
    put(tree.path, {"tests/store/test_a.py": SOAK.replace("        pass", f"        {change}")})
    run(tree).stdout.fnmatch_lines("no receipt longer: what it covers was changed meanwhile")


@pytest.mark.parametrize(
    ("file", "before", "after", "changed"),
    [
        ("src/thaw/store/packs.py", "+ 1", "+ 2", True),
        ("src/thaw/store/packs.py", "    return", '    """Writes."""\n    return', False),
        ("src/thaw/store/packs.py", "return len(blob) + 1", "return (len(blob)  # why\n    + 1)", False),
        ("src/thaw/data/a.bin", "x", "y", True),
        ("tests/store/test_a.py", '"late"]', '"late", "never"]', True),
        ("tests/store/test_a.py", '"twice as long"', '"longer"', False),
    ],
)
def test_what_it_covers_makes_a_receipt_stale_and_words_do_not(
    tree: pytest.Pytester, file: str, before: str, after: str, changed: bool
) -> None:
    run(tree)
    text = (tree.path / file).read_text()
    assert before in text
    put(tree.path, {file: text.replace(before, after)})
    part = file if file.startswith("tests") else str(Path(file).parent)
    assert wrong(tree) == ({name: f"{part} changed since" for name in ("kills", "longer")} if changed else {})


@pytest.mark.parametrize("file", ["laws/kill_law.py", "laws/kit.py", "../../../tests/store/leaks.py"])
def test_the_laws_and_helpers_that_a_test_imports_are_covered(tree: pytest.Pytester, file: str) -> None:
    """Directly, by a package's name for it, and by one another."""
    put(tree.path / "src/thaw/testing", {
        "__init__.py": "def __getattr__(name):\n    from thaw.testing.laws.kill_law import KillTests\n",
        "laws/kill_law.py": "from thaw.testing.laws import kit\nclass KillTests:\n    x = 1\n",
        "laws/kit.py": "x = 1\n",
        "laws/other_law.py": "x = 1\n",
    })  # fmt: skip
    put(tree.path / "tests/store", {
        "leaks.py": "x = 1\n",
        "test_a.py": "if 0:\n    from thaw.testing import KillTests\n    import leaks\n" + SOAK,
    })  # fmt: skip
    run(tree)
    changed = tree.path / "src/thaw/testing" / file
    put(tree.path, {"src/thaw/testing/laws/other_law.py": "x = 2\n"})
    assert wrong(tree) == {}
    changed.write_text(changed.read_text().replace("1", "2"))
    said = wrong(tree)
    assert set(said) == {"kills", "longer"} and all(changed.name in why for why in said.values())


def test_the_lint_names_what_is_wrong_and_what_mends_it(
    tree: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tree)
    folder = tree.path / FOLDER
    damaged = (folder / "kills.json").read_text().replace('"kills": 2.0', '"kills": 9.0')
    put(folder, {"kills.json": damaged, "old.json": damaged})
    capsys.readouterr()
    assert main([], tree.path) == 1
    kills, old = capsys.readouterr().out.splitlines()
    assert "kills.json: digest: " in kills and kills.endswith(" tests/store/test_a.py::test_a_kill")
    assert old.startswith(f"{FOLDER}/old.json: no test leaves it")
    assert main(["--stale"], tree.path) == 0
    (command,) = capsys.readouterr().out.splitlines()
    assert kills.endswith(command) and " .venv/bin/python -m pytest " in command


def test_a_mark_that_cannot_be_read_is_refused(tree: pytest.Pytester) -> None:
    for text, said in (
        ("@pytest.mark.soak\ndef test_x(): pass", "names its receipt"),
        ("@pytest.mark.soak('why', receipt=NAME)\ndef test_x(): pass", "written out"),
        ("pytestmark = pytest.mark.soak('why', receipt='a', covers=('src/none',))", "src/none, which is not there"),
    ):
        put(tree.path, {"tests/store/test_b.py": text})
        with pytest.raises(Unclear, match=said):
            groups(tree.path)
    put(tree.path, {"tests/store/test_b.py": "", "tests/test_c.py": "X = pytest.mark.soak('why', receipt='a')"})
    with pytest.raises(Unclear, match=r"test_c\.py:1: nothing says what tests here cover"):
        groups(tree.path)


def test_other_releases_suites_are_covered_too() -> None:
    found = list(suites(ROOT))
    assert len(found) >= 3 and all((ROOT / path).exists() for group in found for path in group.covers)
    assert commands(found) == [f"make soak-{group.name.removeprefix('suite-')}" for group in found]


def test_a_suite_that_passed_leaves_the_receipt_of_its_release(
    tree: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THAW_SOAK")
    monkeypatch.setenv("THAW_SUITE", "vllm-0.1")
    folders = ("src/thaw/engines/vllm", "src/thaw/engines/served", "src/thaw/testing", "tests/engines/on_vllm")
    files = (*(f"{folder}/a.py" for folder in folders), "constraints-vllm-0.1.txt")
    put(tree.path, {"Makefile": "VLLM_OTHERS := 0.1\n", **dict.fromkeys(files, "")})
    run(tree, "-k", "law").stdout.fnmatch_lines(
        "no receipt suite-vllm-0.1: not all of its tests were asked for*keyword=law"
    )
    assert run(tree).ret == 0 and kept(tree) == {"suite-vllm-0.1"}
    assert set(wrong(tree)) == {"kills", "longer"}
    put(tree.path, {files[-1]: "vllm==0.1.1"})
    assert wrong(tree)["suite-vllm-0.1"] == f"{files[-1]} changed since"
    monkeypatch.setenv("THAW_SUITE", "vllm-0.2")
    assert run(tree).ret == pytest.ExitCode.USAGE_ERROR


def test_a_digest_is_the_same_in_every_python(tmp_path: Path) -> None:
    """A golden one, of what Pythons write differently."""
    put(tmp_path, {"a.py": "class A:\n    def f(self, *, x=None): return f'{x!r:>{self.w}}' + f\"{1.0}\" 'ü'\n"})
    assert digest_of(tmp_path) == "b3:f9d225720db098dc"
