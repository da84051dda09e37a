"""`thaw bench vllm`, as far as no vLLM is needed: options, sizes of the pool, what a receipt is made of.

The run itself is in tests/engines/on_vllm/test_bench_vllm.py.
"""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from click.testing import CliRunner

from thaw import receipt as r
from thaw.bench import vllm as bench
from thaw.bench.rounds import Rounds
from thaw.bench.sample import Sample
from thaw.bench.vllm import report
from thaw.bench.vllm.arms import Document
from thaw.bench.vllm.gap import gaps
from thaw.bench.vllm.options import FLAGS, Options
from thaw.bench.vllm.pressure import with_recomputed
from thaw.cli.verbs import bench_vllm
from thaw.core.errors import InvalidRequest
from thaw.receipt import Hits
from thaw.receipt.machine import this_machine

MODEL = {"model": "folder/name"}
ARMS = (
    "live.300", "hydrate.300", "prefill.300", "fork.4.greedy", "native.4.greedy", "fork.4.seeded", "native.4.seeded",
    "native-logprobs.4.greedy", "native-logprobs.4.seeded", "native-own.4.seeded", "pressure.thaw.first",
    "pressure.native.first", "pressure.thaw", "pressure.native", "idle", "stock",
)  # fmt: skip


def sample(seconds: float, *, cached: int = 100, tokens: str = "a", recomputed: float = 0.0) -> Sample:
    outputs = {name: "b3:" + tokens * 64 for name in ("first_tokens", "first_logprobs", "tokens", "logprobs")}
    return Sample(
        values={
            "first_token_s": seconds,
            "total_s": 2 * seconds,
            "tokens_per_s": 1 / seconds,
            "recomputed": recomputed,
        },
        hits=Hits(num_prompt_tokens=104, num_wanted_tokens=100, num_cached_tokens=cached, num_prefilled_tokens=4),
        outputs=outputs,
    )


def sealed(changed: dict[str, Sample] | None = None) -> r.Receipt:
    measured = {name: [(pair, sample(1.0 + pair / 100)) for pair in range(3)] for name in ARMS}
    for name, other in (changed or {}).items():
        measured[name] = [(pair, other) for pair in range(3)]
    numbers = report.derived(measured)
    return r.make(
        kind="bench.vllm", command="thaw bench vllm", versions={}, machine=this_machine(), model=None, parameters={},
        arms=report.arms(measured), derived=numbers, checks=report.checks(measured), goals=report.goals(numbers),
        notes=report.NOTES,
    )  # fmt: skip


def goal(receipt: r.Receipt, name: str) -> bool:
    return next(goal.held for goal in receipt.goals if goal.name == name)


def test_a_receipt_of_all_arms_verifies_and_answers_every_question() -> None:
    receipt = sealed()
    assert {arm.name for arm in receipt.arms} == set(ARMS)
    assert r.verify(r.dumps(receipt)).problems == ()
    assert {goal.name for goal in receipt.goals} == {
        "gain.hydrate.300", "cost.fork.4.greedy.last", "cost.fork.4.seeded.last", "cost.fork.4.greedy.native-logprobs",
        "cost.fork.4.seeded.native-logprobs", "pressure.thaw.recomputed", "gain.pressure", "cost.idle",
    }  # fmt: skip
    assert all(check.held for check in receipt.checks)
    ratio = receipt.number("cost.fork.4.greedy.last")
    assert ratio is not None and ratio.value == pytest.approx(1) and ratio.num_rounds == 3


def test_goals_are_missed_by_what_they_are_about() -> None:
    assert not goal(sealed(), "gain.pressure") and goal(sealed(), "cost.idle")
    slow = sealed({"pressure.native": sample(9.0), "fork.4.greedy": sample(1.2), "idle": sample(1.2)})
    assert goal(slow, "gain.pressure")
    assert not goal(slow, "cost.fork.4.greedy.last") and not goal(slow, "cost.idle")
    assert goal(slow, "cost.fork.4.seeded.last")
    alike = sealed({"fork.4.greedy": sample(1.2), "native-logprobs.4.greedy": sample(1.2)})
    assert goal(alike, "cost.fork.4.greedy.native-logprobs") and not goal(alike, "cost.fork.4.greedy.last")
    assert not goal(sealed({"pressure.thaw": sample(0.1, recomputed=1)}), "pressure.thaw.recomputed")


def test_a_promised_check_fails_when_tokens_were_prefilled_again_or_bits_differ() -> None:
    failed = {c.name for c in sealed({"pressure.thaw": sample(1.0, cached=99)}).checks if c.promised and not c.held}
    assert failed == {"hit.pressure.thaw"}
    failed = {c.name for c in sealed({"hydrate.300": sample(1.0, tokens="b")}).checks if c.promised and not c.held}
    assert failed == {"same-first_logprobs.hydrate.300"}


def test_forks_that_differ_from_plain_requests_are_information() -> None:
    differs = sealed({"fork.4.greedy": sample(1.0, tokens="b")})
    check = next(check for check in differs.checks if check.name == "same-tokens.fork.4.greedy")
    assert not check.held and not check.promised


def test_a_run_of_some_parts_gives_a_receipt_of_those() -> None:
    measured = {name: [(0, sample(1.0))] for name in ("idle", "stock")}
    numbers = report.derived(measured)
    assert [number.name for number in numbers] == ["idle.rate", "stock.rate", "cost.idle"]
    assert report.checks(measured) == [] and [goal.name for goal in report.goals(numbers)] == ["cost.idle"]


def test_recomputed_is_what_was_wanted_and_not_found() -> None:
    assert with_recomputed(sample(1.0, cached=30)).values["recomputed"] == 70
    assert with_recomputed(sample(1.0, cached=104)).values["recomputed"] == 0


def test_the_pool_holds_a_third_of_the_sessions_and_at_least_one_visit() -> None:
    usual = Options(engine_options=MODEL)
    assert usual.tree_blocks == 8 and usual.few_blocks == 24 * 8 // 3 + 1
    alone = Options(engine_options=MODEL, parts=("pressure",), trees=3, branches=8, branch_tokens=200)
    assert alone.few_blocks == 8 + 8 * 3 + 1
    hydrating = Options(engine_options=MODEL, parts=("hydrate",), lengths=(12_800,))
    assert hydrating.few_blocks >= -(-hydrating.few_longest // 128) + 1


def test_the_longest_request_is_that_of_the_parts_that_run() -> None:
    assert Options(engine_options=MODEL).longest == 7505
    assert Options(engine_options=MODEL, parts=("fork",)).longest == 1024 + 4 + 64
    assert Options(engine_options=MODEL, parts=("idle",)).longest == 128 + 64


def test_options_that_cannot_be_are_refused_by_name() -> None:
    for wrong, said in (
        ({"engine_options": {}}, "model"), ({"parts": ("fork", "forks")}, "parts=fork,forks"), ({"parts": ()}, "parts"),
        ({"rounds": 0}, "rounds=0"), ({"children": (4, 65)}, "children=65"), ({"lengths": (1,)}, "lengths=1"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match=said):
            Options(**{"engine_options": MODEL, **wrong})  # type: ignore[arg-type]


def test_the_command_line_says_what_was_not_usual_and_no_path() -> None:
    assert Options(engine_options=MODEL).command_line("name") == "thaw bench vllm --model name"
    other = Options(engine_options=MODEL, parts=("fork", "idle"), lengths=(100, 200), rounds=3, eager=False)
    assert other.command_line("name") == (
        "thaw bench vllm --model name --only fork,idle --lengths 100,200 --rounds 3 --compile"
    )


def test_the_command_line_can_say_every_size() -> None:
    usual = {field.name: field.default for field in msgspec.structs.fields(Options)}
    said = {names[0]: default for names, _, default, _ in bench_vllm.SIZES}
    flags = {flag: usual[name] for name, flag in FLAGS.items() if flag != "--only"}
    assert said == flags
    numbers = {name for name, default in usual.items() if isinstance(default, (int, tuple))}
    sizes = {name for name in numbers if not isinstance(usual[name], bool)}
    assert sizes == set(FLAGS)


def test_another_engine_is_refused() -> None:
    done = CliRunner().invoke(bench_vllm.command, ["--engine", "transformers", "--model", "x"])
    assert isinstance(done.exception, InvalidRequest) and "bench vllm boots vLLM" in str(done.exception)


def test_rounds_take_every_arm_and_none_follows_always_on_the_same_one() -> None:
    order: list[str] = []
    said: list[str] = []
    rounds = Rounds(said.append)
    arms = {name: lambda name=name: order.append(name) or sample(1.0) for name in "abc"}
    rounds.alternate(8, arms)  # type: ignore[arg-type]
    taken = ["".join(order[i : i + 3]) for i in range(0, 27, 3)]
    assert taken[0] == "abc" and all(sorted(one) == ["a", "b", "c"] for one in taken)
    for even, odd in zip(taken[1::2], taken[2::2], strict=True):
        assert odd == even[::-1]
    assert len(set(taken[1::2])) > 1
    for name in "abc":
        assert [pair for pair, _ in rounds.measured[name]] == list(range(8))
    assert said[:1] == ["warming up: a"] and said[-1] == f"round 8 of 8: {order[-1]}"


def test_sessions_of_the_document_share_no_prefix_and_children_are_asked_different_things() -> None:
    document = Document(range(2000))
    starts = {document.session(300, i)[0] for i in range(6)}
    assert len(starts) == 6 and len(document.session(300)) == 300
    suffixes = document.suffixes(16)
    assert len(set(suffixes)) == 16 and {len(suffix) for suffix in suffixes} == {4}


def test_importing_the_bench_loads_no_torch_and_no_vllm() -> None:
    code = "import sys, thaw.bench.vllm; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_quick_takes_every_part() -> None:
    assert bench.quick(engine_options=MODEL).parts == bench.PARTS


COPIES = ("load.300", "save.300", "bus-in.300", "bus-out.300")
FIRSTS = ("loaded.300.4", "load-and-there.300.4")
GAPS = ("gap.none", "gap.admit", "gap.capture", "gap.hydrate")


def one_of(arm: str, seconds: float) -> Sample:
    if arm in COPIES:
        outputs = {} if arm.startswith("bus") else {"bytes": "b3:" + "a" * 64}
        return Sample(values={"copy_s": seconds, "rate": 1 / seconds, "nbytes": 1.0}, outputs=outputs)
    if arm in GAPS:
        gap = {"largest_gap_s": seconds, "step_s": 0.1, "with_a_step_s": seconds + 0.1, "inside": 1.0}
        found = sample(seconds).hits if arm in ("gap.admit", "gap.hydrate") else None
        return Sample(values={**gap, "event_s": 1.0}, hits=found)
    more = {"loaded_tokens": 299.0, "load_s": seconds / 2, "there_s": seconds / 2}
    usual = sample(seconds)
    return msgspec.structs.replace(usual, values={**usual.values, **more})


def of_a_card(**seconds: float) -> r.Receipt:
    """By the arm's name with underscores; a second each without."""
    told = {arm: seconds.get(arm.replace(".", "_").replace("-", "_"), 1.0) for arm in (*COPIES, *FIRSTS, *GAPS)}
    measured = {arm: [(pair, one_of(arm, told[arm])) for pair in range(3)] for arm in told}
    numbers = report.derived(measured)
    return r.make(
        kind="bench.vllm", command="make bench-gpu", versions={}, machine=this_machine(), model=None, parameters={},
        arms=report.arms(measured), derived=numbers, checks=report.checks(measured), goals=report.goals(numbers),
        notes=report.NOTES,
    )  # fmt: skip


def test_the_goals_of_copies_first_tokens_and_gaps() -> None:
    receipt = of_a_card()
    assert r.verify(r.dumps(receipt)).problems == ()
    assert {goal.name for goal in receipt.goals} == {
        "share.load.300", "share.save.300", "cost.loaded.300.4", "cost.gap.capture", "cost.gap.hydrate",
        "inside.gap.capture", "inside.gap.hydrate",
    }  # fmt: skip
    assert all(goal.held for goal in receipt.goals) and all(check.held for check in receipt.checks)
    slow = of_a_card(load_300=1.06, save_300=1.06, loaded_300_4=1.01, gap_capture=1.09, gap_hydrate=1.11)
    assert {goal.name for goal in slow.goals if not goal.held} == {
        "share.load.300", "cost.loaded.300.4", "cost.gap.hydrate"
    }  # fmt: skip


def test_an_admission_that_prefills_breaks_a_promise() -> None:
    measured = {arm: [(0, one_of(arm, 1.0))] for arm in GAPS}
    ((pair, admitted),) = measured["gap.admit"]
    assert admitted.hits is not None
    lost = msgspec.structs.replace(admitted.hits, num_cached_tokens=admitted.hits.num_wanted_tokens - 1)
    measured["gap.admit"] = [(pair, msgspec.structs.replace(admitted, hits=lost))]
    made = r.make(
        kind="bench.vllm", command="make bench-gpu", versions={}, machine=this_machine(), model=None, parameters={},
        arms=report.arms(measured), derived=report.derived(measured), checks=report.checks(measured), goals=(),
        notes=(),
    )  # fmt: skip
    assert [check.name for check in made.checks if not check.held] == ["hit.gap.admit"]


def test_gaps_are_those_that_the_event_may_have_made() -> None:
    """That which it began in, and that which it ended in, are among them; earlier and later ones are not."""
    found = gaps([[0.0, 9.0, 10.0, 12.0, 15.0, 99.0], [0.5]], began=9.5, until=12.5)
    assert found == [(1.0, 9.0), (2.0, 10.0), (3.0, 12.0)]


def test_boots_that_were_measured_apart_are_one_receipt() -> None:
    def boot(number: int) -> r.Receipt:
        measured = {name: [(number, sample(1.0 + number))] for name in ("idle", "stock")}
        return r.make(
            kind="bench.vllm", command="", versions={"vllm": "1"}, machine=this_machine(), model=None,
            parameters={"idle_boots": 1}, arms=report.arms(measured),
        )  # fmt: skip

    whole = report.joined([boot(0), boot(1), boot(2)], command="make bench-gpu PARTS=idle")
    assert r.verify(r.dumps(whole)).problems == () and whole.parameters["idle_boots"] == 3
    number, arm = whole.number("cost.idle"), whole.arm("stock")
    assert number is not None and number.num_rounds == 3 and arm is not None
    assert [taken.pair for taken in arm.rounds] == [0, 1, 2]
    other = msgspec.structs.replace(boot(1), versions={"vllm": "2"})
    with pytest.raises(InvalidRequest, match="anew"):
        report.joined([boot(0), other], command="")
