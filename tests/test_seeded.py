"""The faults that `seeded.py` seeds: each can be, and what became of it is told. That all are caught, in the soak."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import seeded
from seeded import FAULTS, PYTHONS, ROOT, Broken, Fault, Ran


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_a_change_of_one_place_that_is_still_python(fault: Fault) -> None:
    text = (ROOT / "src" / "thaw" / fault.file).read_text("utf-8")
    assert text.count(fault.old) == 1 and fault.new != fault.old, "the code has changed: write the fault anew"
    compile(text.replace(fault.old, fault.new), fault.file, "exec")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_tests_of_a_fault_are_there(fault: Fault) -> None:
    laws = "".join(path.read_text("utf-8") for path in (ROOT / "src/thaw/testing").rglob("*.py"))
    for test in fault.tests:
        file, _, names = test.partition("::")
        text = (ROOT / file).read_text("utf-8")
        *classes, function = names.split("::")
        assert all(re.search(rf"^class {name}\b", text, re.M) for name in classes), test
        assert f"def {function}(" in (text + laws if classes else text), test


def test_faults_are_spread_over_laws_and_engines() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    assert {str(law) for law in range(1, 10)} <= {fault.law for fault in FAULTS}
    engines = Counter(fault.engine for fault in FAULTS)
    assert engines.keys() == PYTHONS.keys() and min(engines.values()) >= 3


@pytest.mark.slow("runs pytest, seven times")
def test_what_becomes_of_a_fault_is_told_apart(tmp_path: Path) -> None:
    """A whole run of the script, on a package of one line that is called thaw, too."""
    tests = "import thaw\n\ndef test_two():\n    assert thaw.two() == 2\n\ndef test_any():\n    thaw.two()\n"
    tree = tmp_path / "tree"
    for name, text in (("src/thaw/__init__.py", "def two():\n    return 2\n"), ("tests/test_two.py", tests)):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    (tmp_path / PYTHONS["none"]).symlink_to(sys.prefix)

    def fault(name: str, old: str, new: str, test: str) -> Fault:
        return Fault(name, "1", "none", "__init__.py", old, new, (f"tests/test_two.py::{test}",), "")

    faults = [
        fault("caught", "return 2", "return 3", "test_two"),
        fault("missed", "return 2", "return 3", "test_any"),
        fault("gone", "return 2", "return 3", "test_three"),
        fault("does-not-apply", "return 4", "return 3", "test_two"),
        fault("no-python", "return 2", "return (", "test_two"),
        fault("no-name", "return 2", "return too", "test_two"),
    ]
    before = contents(tree)
    outcomes = {outcome.fault.name: outcome for outcome in seeded.show(faults, tree, tmp_path)}
    assert outcomes["caught"].caught == "tests/test_two.py::test_two"
    assert outcomes["missed"].verdict == "MISSED"
    assert "test_three was not run" in outcomes["gone"].error
    assert "stands 0 times" in outcomes["does-not-apply"].error
    assert "never closed" in outcomes["no-python"].error
    assert "NameError" in outcomes["no-name"].error
    assert [name for name, outcome in outcomes.items() if outcome.caught] == ["caught"]
    assert seeded.counts(list(outcomes.values()))["laws"] == {"law-1": 1}
    assert contents(tree) == before, "only a copy is seeded"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_name_that_no_fault_has_is_refused() -> None:
    with pytest.raises(SystemExit, match="no fault lost-sync"):
        seeded.main(["lost-sync"])


@pytest.mark.parametrize("ran", [Ran(2, {}, ""), Ran(5, {}, ""), Ran(1, {}, ""), Ran(1, {"a": "Failed: Timeout"}, "")])
def test_a_run_in_which_no_test_failed_by_itself_is_no_catch(ran: Ran) -> None:
    with pytest.raises(Broken):
        seeded.caught_by(ran)


@pytest.mark.soak(
    "runs tests with some fifty faults in src/, one after another, on every engine", receipt="seeded-faults",
    covers=("src/thaw/testing", "tests/seeded.py"),
)  # fmt: skip
@pytest.mark.timeout(4 * 3600)
def test_every_fault_is_caught(soak_receipt: Callable[..., None]) -> None:
    outcomes = seeded.show(FAULTS, ROOT, ROOT)
    assert [seeded.row(outcome) for outcome in outcomes if not outcome.caught] == []
    soak_receipt(
        what=f"{len(FAULTS)} faults, each in a copy of src/ of its own, and the few tests that must fail because of it",
        held="without them all these tests passed, and with each of them one failed",
        **seeded.counts(outcomes),
    )
