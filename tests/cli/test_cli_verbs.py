"""Every verb does what its help says, as text and as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import thaw

from .conftest import Shell

PLAIN = re.compile(r"\x1b\[")


def test_init_makes_a_repository_and_remembers_the_engine(shell: Shell) -> None:
    made = shell.ok("init", "deep/er", "--engine", "fake", "--json").json()
    assert Path(made["path"]) == shell.cwd / "deep" / "er" / ".thaw"
    assert made["engine"] == {"name": "fake", "options": {}}
    again = shell("init", "deep/er")
    assert again.code == 4
    assert "repository already" in again.err


def test_the_nearest_repository_above_is_found(repo: Shell) -> None:
    below = repo.cwd / "a" / "b"
    below.mkdir(parents=True)
    Shell(below).ok("run", "hello", "--no-generate")
    assert repo.ok("log", "--json").json()["commits"][0]["message"] == "hello"


def test_repo_option_and_variable_name_a_repository(repo: Shell, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = Shell(tmp_path_factory.mktemp("elsewhere"))
    repo.ok("run", "hello", "--no-generate")
    for named in (str(repo.cwd), str(repo.cwd / ".thaw")):
        assert len(elsewhere.ok("-C", named, "log", "--json").json()["commits"]) == 1
        assert len(elsewhere.ok("log", "-C", named, "--json").json()["commits"]) == 1
        assert len(elsewhere.ok("log", "--json", THAW_REPO=named).json()["commits"]) == 1
    missing = elsewhere("log")
    assert missing.code == 2
    assert "thaw init" in missing.err


def test_namespace_option_and_variable_name_a_namespace(repo: Shell) -> None:
    repo.ok("--namespace", "acme", "run", "the plans", "--no-generate")
    commit = repo.ok("log", "--json", THAW_NAMESPACE="acme").json()["commits"][0]["commit"]
    assert repo.ok("--namespace", "acme", "show", commit, "--json", THAW_NAMESPACE="bolt").json()["commit"] == commit
    assert repo("show", commit).code == repo("show", commit, THAW_NAMESPACE="bolt").code == 2
    assert repo.ok("log", "--json").json()["commits"] == []
    refused = repo("--namespace", "acme", "gc")
    assert refused.code == 2 and "without a namespace" in refused.err
    assert repo("--namespace", "a/b", "log").code == repo("log", THAW_NAMESPACE="@acme").code == 2


def test_run_streams_the_completion_and_nothing_else_to_stdout(repo: Shell) -> None:
    done = repo.ok("run", "Once upon", "--max-tokens", "9", "--temperature", "0", "--seed", "3")
    said = repo.ok("show", "--json").json()
    assert done.out == said["turns"][-1]["text"] + "\n"
    assert "[main " in done.err


def test_run_goes_on_with_what_is_there(repo: Shell) -> None:
    repo.ok("run", "first", "--max-tokens", "5")
    done = repo.ok("run", "second", "--max-tokens", "5", "--json").json()
    assert done["branch"] == "main"
    assert done["num_tokens"] == len("first") + 5 + len("second") + 5
    assert done["usage"]["num_cached_tokens"] > 0
    assert done["usage"]["num_prefilled_tokens"] == len("second") + 1
    assert done["proof"]["first_mismatch"] is None
    assert len(repo.ok("log", "--json").json()["commits"]) == 2


def test_run_reads_files_and_stdin(repo: Shell) -> None:
    (repo.cwd / "a.txt").write_text("aaa")
    (repo.cwd / "b.txt").write_text("bbbb")
    repo.ok("run", "--file", "a.txt", "--file", "b.txt", "--no-generate")
    repo.ok("run", "-", "--max-tokens", "2", stdin="from a pipe")
    repo.ok("run", "--max-tokens", "2", stdin="alone")
    texts = [turn["text"] for turn in repo.ok("show", "--json").json()["turns"] if turn["kind"] == "prompt"]
    assert texts == ["aaa", "bbbb", "from a pipe", "alone"]


def test_run_with_nothing_to_read_goes_on(repo: Shell) -> None:
    repo.ok("run", "start", "--no-generate")
    repo.ok("run", "--max-tokens", "4")
    assert repo.ok("show", "--json").json()["num_tokens"] == len("start") + 4


def test_run_resumes_a_completion_that_was_cut(repo: Shell) -> None:
    whole = repo.ok("run", "start", "--max-tokens", "20", "--json").json()
    cut = len("start") + 7
    again = repo.ok("run", "--from", f"main:token={cut}", "--branch", "again", "--json").json()
    assert again["token_ids"] == whole["token_ids"]
    assert again["logprobs"] == whole["logprobs"]


def test_run_from_a_point_makes_a_branch(tree: Shell) -> None:
    refused = tree("run", "x", "--from", "main:token=10", "--max-tokens", "2")
    assert refused.code == 2
    assert "--branch" in refused.err
    tree.ok("run", "x", "--from", "main:token=10", "--branch", "side", "--max-tokens", "2")
    assert tree.ok("show", "side", "--json").json()["num_tokens"] == 13
    taken = tree("run", "x", "--from", "main:token=10", "--branch", "fork/0", "--max-tokens", "2")
    assert taken.code == 2
    assert "adopt" in taken.err


def test_the_first_branch_becomes_the_current_one(repo: Shell) -> None:
    repo.ok("run", "hello", "--branch", "trunk", "--no-generate")
    assert repo.ok("branch", "--json").json()["head"] == "trunk"


def test_chat_keeps_the_conversation_over_processes(repo: Shell) -> None:
    repo.ok("run", "--chat", "first question", "--max-tokens", "6")
    done = repo.ok("run", "--chat", "second question", "--max-tokens", "6", "--json").json()
    assert done["usage"]["num_cached_tokens"] > len("first question")
    text = repo.ok("show", "--text").out
    assert text.index("first question") < text.index("second question")


def test_chat_options_become_part_of_the_conversation(repo: Shell) -> None:
    greedy = ("--temperature", "0", "--max-tokens", "6")
    (repo.cwd / "tools.json").write_text('[{"type": "function", "function": {"name": "weather"}}]')
    repo.ok(
        "run", "--chat", "hello", "--system", "Be brief.", "--tools", "tools.json", "--template-var", "thinking=false",
        "--prefill", "Well, ", *greedy,
    )  # fmt: skip
    text = repo.ok("show", "--text").out
    assert '"weather"' in text and '"thinking": false' in text
    assert "system\nBe brief.</s><s>user\nhello</s><s>assistant\nWell, " in text
    done = repo.ok("run", "--chat", "and?", "--system", "Be brief.", *greedy, "--json").json()
    assert (done["forked_at"], done["num_dropped_tokens"], done["num_dropped_sampled"]) == (None, 0, 0)
    assert repo.ok("show", "--text").out.count("Be brief.") == 1
    other = repo("run", "--chat", "more", "--system", "Be long.", *greedy)
    assert other.code == 2
    assert "Be brief." in other.err
    late = repo("run", "more", "--system", "Be long.", "--keep-sampled")
    assert late.code == 2
    assert "--system, --keep-sampled: use only with --chat" in late.err
    assert repo("run", "--chat", "more", "--template-var", "thinking").code == 2
    (repo.cwd / "tools.json").write_text("{}")
    assert repo("run", "--chat", "more", "--tools", "tools.json").code == 2


def test_a_system_message_of_the_session_is_not_left_behind(repo: Shell) -> None:
    """Whoever said it: here a program, and then the command line goes on."""
    with thaw.load_engine("fake") as engine, thaw.open(repo.cwd / ".thaw", engine=engine) as opened:
        session = opened.session()
        session.append(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Read this."}])
        session.commit("read", branch="main")
    repo.ok("run", "--chat", "hello", "--max-tokens", "4", "--engine", "fake")
    text = repo.ok("show", "--text").out
    assert text.startswith("<s>system\nBe brief.</s><s>user\nRead this.</s><s>user\nhello</s>")


def test_a_conversation_given_whole_replaces_what_was_said(repo: Shell) -> None:
    greedy = ("--temperature", "0", "--max-tokens", "6")
    repo.ok("run", "--chat", "hello", *greedy)
    (repo.cwd / "talk.json").write_text(
        '[{"role": "user", "content": "hallo"}, {"role": "assistant", "content": [{"type": "text", "text": "ja"}]}]'
    )
    done = repo.ok("run", "--chat", "und?", "--history", "talk.json", *greedy)
    assert "2 messages on the branch are not in --history: continued from token" in done.err
    assert "left behind, 6 of them sampled (the previous commit has them)" in done.err
    text = repo.ok("show", "--text").out
    assert "<s>assistant\nja</s><s>user\nund?" in text and "hello" not in text
    assert "hello" in repo.ok("show", "main~1", "--text").out
    again = repo.ok("run", "--chat", "und?", "--history", "talk.json", *greedy, "--json")
    assert again.json()["num_dropped_messages"] == 1 and "1 message on the branch" in again.err


def test_a_chat_that_cannot_be_is_refused_before_a_model_is_booted(tree: Shell) -> None:
    (tree.cwd / "talk.json").write_text('{"role": "user"}')
    for words in (
        ("run", "--chat", ""),
        ("run", "--chat", "hello", "--no-generate"),
        ("run", "--chat", "hello", "--history", "talk.json"),
        ("run", "--chat", "hello", "--history", "nowhere.json"),
        ("fork", "main", "--chat"),
        ("fork", "main", "--chat", "one", ""),
    ):
        done = tree(*words, "--engine", "transformers", "--model", "no-such-model")
        assert done.code in (2, 3) and "no-such-model" not in done.err, (words, done.err)


def test_fork_runs_one_batch_and_makes_a_branch_each(tree: Shell) -> None:
    done = tree.ok("fork", "main", "Why?", "-n", "3", "--name", "try", "--max-tokens", "6", "--json").json()
    children = done["children"]
    assert [child["branch"] for child in children] == ["try/0", "try/1", "try/2"]
    assert len({tuple(child["token_ids"]) for child in children}) == 3
    assert len({child["seed"] for child in children}) == 3
    for child in children:
        assert child["usage"]["num_prefilled_tokens"] == len("Why?")
        assert child["usage"]["num_cached_tokens"] == child["proof"]["num_cached_tokens"]


def test_fork_takes_one_prompt_a_child(tree: Shell) -> None:
    (tree.cwd / "q.jsonl").write_text('"one"\n{"prompt": "two", "max_tokens": 3}\n\n{"prompt": "three", "seed": 5}\n')
    done = tree.ok("fork", "main", "--prompts", "q.jsonl", "--max-tokens", "7", "--json").json()["children"]
    assert [child["prompt"] for child in done] == ["one", "two", "three"]
    assert len(done[1]["token_ids"]) == 3
    assert [child["branch"] for child in done] == ["fork2/0", "fork2/1", "fork2/2"]
    assert done[2]["seed"] == "5"


def test_fork_checks_names_and_prompts_before_anything_runs(tree: Shell) -> None:
    taken = tree("fork", "main", "x", "-n", "2", "--name", "fork")
    assert taken.code == 2
    assert "fork/0" in taken.err
    (tree.cwd / "q.jsonl").write_text('{"text": "no prompt"}\n')
    assert tree("fork", "main", "--prompts", "q.jsonl").code == 2
    (tree.cwd / "q.jsonl").write_text('{"prompt": "x", "temprature": 1}\n')
    wrong = tree("fork", "main", "--prompts", "q.jsonl")
    assert wrong.code == 2
    assert "temprature" in wrong.err
    assert len(tree.ok("branch", "--json").json()["branches"]) == 3


def test_replayed_children_repeat_the_parent(repo: Shell) -> None:
    whole = repo.ok("run", "start", "--max-tokens", "12", "--json").json()
    cut = len("start") + 5
    done = repo.ok("fork", f"main:token={cut}", "-n", "2", "--replay", "--json").json()["children"]
    assert [child["token_ids"] for child in done] == [whole["token_ids"]] * 2


def test_fork_in_a_chat_renders_the_next_message(repo: Shell) -> None:
    greedy = ("--temperature", "0", "--max-tokens", "5")  # sampled bytes may be no text, which no template renders back
    repo.ok("run", "--chat", "hello", *greedy)
    repo.ok("fork", "main", "one?", "two?", "--chat", *greedy)
    repo.ok("run", "--chat", "and then?", "--branch", "fork/1", *greedy)
    text = repo.ok("show", "fork/1", "--text").out
    assert text.index("hello") < text.index("two?") < text.index("and then?")
    done = repo.ok("fork", "main:turn=2", "three?", "-n", "2", "--chat", "--prefill", "So ", *greedy, "--json").json()
    assert [child["forked_at"] for child in done["children"]] == [None, None]
    assert "three?</s><s>assistant\nSo " in repo.ok("show", "fork2/0", "--text").out


def test_branches_and_tags_are_made_listed_renamed_deleted(tree: Shell) -> None:
    commit = tree.commit()
    tree.ok("branch", "idea", "main")
    assert tree.ok("branch", "-m", "idea", "plan", "--json").json()["branches"] == [{"name": "plan", "commit": commit}]
    names = [ref["name"] for ref in tree.ok("branch", "--json").json()["branches"]]
    assert names == ["fork/0", "fork/1", "main", "plan"]
    assert tree.ok("branch", "-d", "plan", "fork/0").out.count("deleted branch") == 2
    assert tree.ok("tag", "--json").json() == {"tags": [{"name": "read", "commit": commit}]}
    tree.ok("tag", "-d", "read")
    assert tree.ok("tag", "--json").json() == {"tags": []}
    assert "* main" in tree.ok("branch").out
    assert tree("branch", "main").code == 4
    assert tree("branch", "-d").code == 2
    assert tree("branch", "-m", "one").code == 2


def test_log_lists_and_draws(tree: Shell) -> None:
    assert tree.ok("log").out.count("\n") == 1
    assert len(tree.ok("log", "--all", "--json").json()["commits"]) == 3
    assert len(tree.ok("log", "--all", "-n", "2", "--json").json()["commits"]) == 2
    drawn = tree.ok("log", "--all", "--graph").out
    assert [line.split(" ")[0] for line in drawn.splitlines()] == ["●", "│", "├─╯", "●"]
    ascii_drawn = tree.ok("log", "--all", "--graph", PYTHONUTF8="0", PYTHONIOENCODING="ascii").out
    assert [line.split(" ")[0] for line in ascii_drawn.splitlines()] == ["*", "|", "+-'", "*"]
    assert tree("log", "main", "--all").code == 2


def test_log_of_an_empty_repository_says_so(repo: Shell) -> None:
    done = repo.ok("log")
    assert (done.out, "no commits" in done.err) == ("", True)
    assert repo.ok("log", "--json").json() == {"commits": []}


def test_show_gives_state_turns_origin_and_bytes(tree: Shell) -> None:
    said = tree.ok("show", "fork/0", "--json").json()
    assert said["origin"]["engine"] == "fake"
    assert said["model"]["architecture"] == "Fake"
    assert said["nbytes"] > 0
    assert [turn["kind"] for turn in said["turns"]] == ["prompt", "prompt", "completion"]
    assert "token_ids" not in said
    assert len(tree.ok("show", "--json", "--tokens").json()["token_ids"]) == said["turns"][0]["end"]
    text = tree.ok("show", "fork/0").out
    assert said["commit"] in text
    assert "turn 3" in text
    inside = tree.ok("show", "main:token=100").out
    assert "100 tokens of" in inside


def test_diff_says_where_tokens_part(tree: Shell) -> None:
    base = tree.ok("show", "main", "--json").json()["num_tokens"]
    found = tree.ok("diff", "fork/0", "fork/1", "--json").json()
    assert found["num_common_tokens"] == base
    assert found["equal"] is False
    assert found["a"]["token"] == ord("W")
    assert found["nbytes_shared"] > found["a"]["nbytes_own"] > 0
    text = tree.ok("diff", "fork/0", "fork/1").out
    assert "- Why?" in text
    assert "+ How?" in text
    assert tree.ok("diff", "main", "read", "--json").json()["equal"] is True
    assert "equal" in tree.ok("diff", "main").out


def test_diff_shows_the_logprobs_where_sampled_tokens_part(repo: Shell) -> None:
    repo.ok("run", "start", "--no-generate")
    repo.ok("fork", "main", "-n", "2", "--max-tokens", "8")
    found = repo.ok("diff", "fork/0", "fork/1", "--json").json()
    assert found["a"]["logprob"] < 0 > found["b"]["logprob"]
    assert "logprob -" in repo.ok("diff", "fork/0", "fork/1").out


def test_adopt_moves_the_branch_and_keeps_the_old_tip(tree: Shell) -> None:
    old, new = tree.commit("main"), tree.commit("fork/1")
    assert tree.ok("adopt", "fork/1", "--json").json() == {"branch": "main", "commit": new, "previous": old}
    assert tree.commit("main") == new
    assert tree.commit("main@{1}") == old


def test_match_finds_the_longest_stored_prefix(tree: Shell) -> None:
    text = "a document that is long enough to share. " * 20
    found = tree.ok("match", text + "and more", "--json").json()
    assert found["num_matched"] == len(text)
    assert found["num_tokens"] == len(text) + len("and more")
    assert found["point"] == tree.commit("main")[3:19] or found["point"].endswith(f":token={len(text)}")
    ids = tree.ok("match", "--tokens", json.dumps(list(text[:300].encode())), "--json").json()
    assert ids["num_matched"] == 300
    assert tree.ok("match", "--json", stdin="nothing like it").json()["point"] is None
    assert tree("match", "--tokens", "[1, 'x']").code == 2


def test_verify_reports_every_law(tree: Shell) -> None:
    report = tree.ok("verify", "fork/0", "--tokens", "3", "--json").json()
    assert report["ok"] is True
    assert report["fresh_process"] is True
    assert {law["name"] for law in report["laws"]} == {"bytes", "identity", "cached", "state", "boundary"}
    assert report["continuation"]["num_tokens"] == 3
    assert "every promised law held" in tree.ok("verify", "fork/0").out


def test_verify_fails_when_a_byte_was_changed(tree: Shell) -> None:
    packs = sorted((tree.cwd / ".thaw" / "packs").iterdir(), key=lambda path: -path.stat().st_size)
    data = bytearray(packs[0].read_bytes())
    data[-100] ^= 1
    packs[0].chmod(0o600)
    packs[0].write_bytes(data)
    report = tree("verify", "main", "--json")
    assert report.code == 7
    assert report.json()["ok"] is False
    assert "FAILED" in tree("verify", "main").out
    checked = tree("fsck", "--json")
    assert checked.code == 5
    assert checked.json()["problems"][0]["commits"]
    assert "damaged" in tree("fsck").out


def test_fsck_rebuilds_a_lost_database(tree: Shell) -> None:
    assert tree.ok("fsck", "--json").json()["ok"] is True
    commits = tree.ok("log", "--all", "--json").json()["commits"]
    for name in ("thaw.db", "thaw.db-wal", "thaw.db-shm"):
        (tree.cwd / ".thaw" / name).unlink(missing_ok=True)
    lost = tree("log")
    assert lost.code == 5
    assert "fsck --rebuild" in lost.err
    assert tree.ok("fsck", "--rebuild", "--json").json()["rebuilt"] is True
    assert tree.ok("log", "--all", "--json").json()["commits"] == commits


def test_gc_takes_what_nothing_refers_to(tree: Shell) -> None:
    tree.ok("branch", "-d", "fork/0", "fork/1")
    assert tree.ok("gc", "--dry-run", "--json").json()["commits_removed"] == 0
    planned = tree.ok("gc", "--dry-run", "--keep-days", "0", "--json").json()
    assert (planned["dry_run"], planned["commits_removed"]) == (True, 2)
    assert tree.ok("gc", "--keep-days", "0", "--json").json()["commits_removed"] == 2
    assert "removed 0 commits" in tree.ok("gc", "--keep-days", "0").out
    tree.ok("verify", "main", "--tokens", "0")


def test_undo_and_reflog_go_back_move_by_move(repo: Shell) -> None:
    repo.ok("run", "a document. " * 20, "--no-generate", "-m", "first")
    first = repo.commit()
    repo.ok("run", "more. " * 20, "--no-generate", "-m", "second")
    second = repo.commit()
    moves = repo.ok("reflog", "--json").json()
    assert [(move["point"], move["new"]) for move in moves["moves"]] == [("main@{0}", second), ("main@{1}", first)]
    assert [repo.commit(move["point"]) for move in moves["moves"]] == [second, first]
    assert "second" in repo.ok("reflog", "main", "-n", "1").out
    assert "is at" in repo.ok("undo").out and repo.commit() == first
    assert repo.ok("undo", "main", "--json").json()["new"] is None
    gone = repo("undo")
    assert gone.code == 2 and "no move left" in gone.err
    repo.ok("branch", "main", second[3:15])
    unknown = repo("reflog", "none")
    assert unknown.code == 2 and "no branch or tag 'none'" in unknown.err and "there are: main" in unknown.err


def test_stats_say_what_sharing_saves(tree: Shell) -> None:
    found = tree.ok("stats", "--prefill-rate", "1000", "--json").json()
    assert {ref["name"] for ref in found["refs"]} == {"main", "fork/0", "fork/1", "read"}
    assert found["dedup"] > 1 and found["seconds_saved"] == found["num_tokens_saved"] / 1000
    assert "times as much" in tree.ok("stats").out


LIMIT = 1 << 30


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("run", "--file", "/dev/zero"), 2),
        (("fork", "main", "--prompts", "/dev/zero"), 2),
        (("match", "--file", "/dev/zero"), 2),
        (("receipt", "verify", "/dev/zero"), 7),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_an_endless_file_is_refused_in_bounded_memory(tree: Shell, words: tuple[str, ...], code: int) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 * LIMIT, before[1]))
    try:
        done = tree(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert done.code == code and "the most that is read here" in done.out + done.err


def test_endless_stdin_is_refused(tree: Shell) -> None:
    import subprocess
    import sys

    with open("/dev/zero", "rb") as zero:
        done = subprocess.run(
            [sys.executable, "-m", "thaw.cli", "run", "-"], cwd=tree.cwd, stdin=zero, capture_output=True, timeout=300
        )
    assert done.returncode == 2 and b"stdin has more than" in done.stderr


@pytest.mark.slow("imports an engine and measures the machine, three times")
def test_doctor_looks_at_the_machine_and_at_a_config(shell: Shell) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "intermediate_size": 128,
        "max_position_embeddings": 512, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (shell.cwd / "config.json").write_text(json.dumps(config))
    report = shell.ok("doctor", "--config", "config.json", "--quick", "--json").json()
    assert report["model"]["supported"] is True
    assert report["model"]["kv_token_nbytes"] == 2 * 2 * 2 * 16 * 2
    assert "256 B a token" in shell.ok("doctor", "--config", "config.json", "--quick").out
    (shell.cwd / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 8}))
    refused = shell("doctor", "--config", "config.json", "--quick")
    assert refused.code == 1
    assert "latent" in refused.out
    assert shell("doctor", "--config", "nothing.json").code == 2


@pytest.mark.slow("runs a bench")
def test_bench_writes_a_receipt_that_verifies_and_a_picture(shell: Shell) -> None:
    done = shell.ok("bench", "fork", "--engine", "fake", "--quick", "--out", "b.json", "--svg", "b.svg")
    assert "promised checks held" in done.out
    assert (shell.cwd / "b.svg").read_text().startswith("<svg")
    assert shell.ok("receipt", "verify", "b.json", "--json").json()["ok"] is True
    changed = (shell.cwd / "b.json").read_text().replace('"children": 4', '"children": 5')
    (shell.cwd / "c.json").write_text(changed)
    bad = shell("receipt", "verify", "b.json", "c.json", "missing.json", "--json")
    assert bad.code == 7
    assert [receipt["ok"] for receipt in bad.json()["receipts"]] == [True, False, False]


@pytest.mark.parametrize("words", [["log"], ["log", "--graph", "--all"], ["show"], ["branch"], ["diff", "fork/0"]])
def test_a_pipe_gets_no_colour(tree: Shell, words: list[str]) -> None:
    assert not PLAIN.search(tree.ok(*words).out)


def test_the_engine_and_its_options_are_remembered(shell: Shell) -> None:
    from thaw.repo.settings import EngineSettings, recall
    from thaw.store import Store

    def remembered() -> EngineSettings | None:
        with Store.open(shell.cwd / ".thaw") as store:
            return recall(store)

    shell.ok("init")
    missing = shell("run", "x")
    assert missing.code == 2
    assert "--model" in missing.err
    shell.ok("run", "x", "--engine", "fake", "--model", "paper", "--no-generate")
    assert remembered() == EngineSettings(name="fake", options={"model": "paper"})
    shell.ok("run", "y", "--max-tokens", "2")
    assert remembered() == EngineSettings(name="fake", options={"model": "paper"})
