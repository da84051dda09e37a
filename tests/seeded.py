"""Seed faults into src/ one at a time, and show that the tests catch each.

    python tests/seeded.py                           every fault; 25 minutes on 2 cores
    python tests/seeded.py --engine transformers     those that one engine's tests must catch; `none` needs no model
    python tests/seeded.py --list                    what there is
    python tests/seeded.py lost-fsync --tree DIR     one, in another checkout, with the environments of this one

A fault is a line or two as a tired engineer might write them, and the few tests that must fail because of it. Each is
put into a fresh copy of the tree: nothing is changed in the tree itself. A fault is *caught* when one of its tests runs
and fails. It is an error, and no catch, when the text to be changed is not there exactly once, when tests are not found
or not run, or when a name or an import is missing. First all the tests are run unseeded: what fails by itself proves
nothing. The exit code is 0 only if every fault was caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = {"none": ".venv", "fake": ".venv", "transformers": ".venv", "vllm": ".venv-vllm", "sglang": ".venv-sglang"}
"""The environment of each engine's tests, below the root; "none": of tests that need no engine, or any."""
LIMIT_S = 1200.0
"""For the tests of one fault; they take seconds, or a minute where an engine boots."""
OPTIONS = ("-q", "--show-capture=no", "--hypothesis-seed=0", "-p", "no:cacheprovider")
"""Of pytest. With one seed, Hypothesis finds today what it found yesterday."""
USAGE_ERROR = 4
"""pytest's exit code where a test that was asked for is not there."""
NOT_HANDED_ON = (
    "OMP_NUM_THREADS", "THAW_SOAK", "THAW_SUITE", "THAW_RECEIPTS_DIR", "THAW_COLD_BOOTS", "THAW_BOOT_LOG",
    "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST",
)  # fmt: skip
"""Of the environment. Tests run one after another here and have all cores, which some of these laws are about."""
NOT_A_CATCH = ("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "UnboundLocalError", "Failed: Timeout")
"""How a test fails because a fault was written badly, or the machine is slow."""

FAKE = "tests/engines/test_engine_fake.py::TestFake"
LLAMA = "tests/engines/test_engine_transformers.py::TestEveryLaw"
GROUPS = "tests/engines/test_engine_groups.py"
KINDS = "tests/engines/test_transformers_kinds.py"
STATES = "tests/engines/test_engine_states.py"
SERVED_GROUPS = "tests/engines/test_served_groups.py"
REPO_GROUPS = "tests/repo/test_repo_groups.py"
NAMESPACES = "tests/repo/test_namespaces.py"
VLLM = "tests/engines/on_vllm/test_engine_vllm.py::TestVllm"
SGLANG = "tests/engines/on_sglang/test_engine_sglang.py::TestSglang"
POOL = "tests/pool/test_pool_laws.py::TestInProcess"


@dataclass(frozen=True)
class Fault:
    """In `file`, below src/thaw, `old` is to become `new`; one of `tests` then fails. `law`: its number, or a part."""

    name: str
    law: str
    engine: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Outcome:
    """`caught`: the test that failed; `error`: why nothing was shown. Neither: the fault was missed."""

    fault: Fault
    caught: str
    error: str
    seconds: float

    @property
    def verdict(self) -> str:
        return self.caught or (f"ERROR: {self.error}" if self.error else "MISSED")


GATEWAY = "tests/gateway"
LANGGRAPH = "tests/with_langgraph"
FAULTS = (
    # --- law 1, bytes
    Fault(
        "unverified-blob", "1", "none", "data/stream.py",
        "            compare(location, digest(view))\n", "            digest(view)\n",
        ("tests/data/test_stream.py::test_a_changed_byte_is_found_and_never_handed_on",),
        "a blob that was damaged on disk is handed on",
    ),
    Fault(
        "answered-while-readers-write", "1", "none", "data/readers/head.py",
        "while busy or (parts and not (whole.kind or whole.lost)):", "while parts and not (whole.kind or whole.lost):",
        ("tests/engines/test_served_readers.py::test_a_load_whose_reader_is_killed_is_read_by_threads",),
        "a load is whole for the engine while a reader still writes it",
    ),
    Fault(
        "last-tier-first", "1", "none", "data/tiers/mounted.py",
        "in self._tiers:\n            try:", "in self._tiers[::-1]:\n            try:",
        ("tests/data/test_mounts.py::test_a_pack_comes_from_the_first_tier_that_has_it",),
        "what lies near is fetched from afar",
    ),
    Fault(
        "failing-tier-passed-over", "6", "none", "data/tiers/mounted.py",
        "            except MissingPack as error:\n", "            except ThawError as error:\n",
        ("tests/data/test_mounts.py::test_a_tier_that_fails_is_an_error_and_no_other_is_asked",),
        "a tier that is down is passed over, and nobody hears of it",
    ),
    Fault(
        "captured-before-the-chat", "1", "none", "pool/schedule/captures.py",
        "return point if ref == session.engine_ref else None", "return point",
        ("tests/pool/test_pool_parts.py::test_a_session_that_a_chat_moved_is_captured_anew",),
        "what a session said before a chat dropped it is loaded in another worker",
    ),
    Fault(
        "kept-past-the-chat", "1", "none", "pool/session.py",
        "        self.kept_in = self.kept_in.cut(keep)\n", "",
        ("tests/pool/test_pool_parts.py::test_what_each_store_kept_of_it_ends_where_the_chat_moved_it_to",),
        "what the arena has of dropped tokens is taken for those that followed",
    ),
    Fault(
        "heads-in-reverse", "1", "fake", "engines/embedded/transfer.py",
        "blobs={group.name: tuple(islice(ids, group.num_blobs)) for group in there},",
        "blobs={group.name: tuple(islice(ids, group.num_blobs))[::-1] for group in there},",
        (f"{FAKE}::test_restored_kv_equals_captured_kv_byte_for_byte",),
        "a segment names the blobs of its heads in the wrong order",
    ),
    Fault(
        "partial-page-transposed", "1", "transformers", "engines/transformers/kv.py",
        "plane[:, :, start:stop].flatten(1)", "plane[:, :, start:stop].transpose(0, 1).flatten(1)",
        (f"{LLAMA}::test_restored_kv_equals_captured_kv_byte_for_byte",),
        "a partial page is written as [K|V][layer], and read as [layer][K|V]",
    ),
    Fault(
        "last-tokens-for-first", "1", "transformers", "engines/transformers/kv.py",
        "tokens[:, :, : stop - start].to(plane.device)", "tokens[:, :, start - stop :].to(plane.device)",
        (f"{LLAMA}::test_a_point_inside_a_prompt_equals_any_other_fork_there",),
        "a fork inside a segment takes the blob's last tokens, not its first",
    ),
    Fault(
        "keys-and-values-swapped", "1", "vllm", "engines/vllm/worker/layout/packed.py",
        "source[:, layer, 0].transpose(0, 1), source[:, layer, 1].transpose(0, 1), slots",
        "source[:, layer, 1].transpose(0, 1), source[:, layer, 0].transpose(0, 1), slots",
        ("tests/engines/on_vllm/test_layout.py::TestPackedPages::test_scatter_is_the_inverse_and_touches_nothing_else",),
        "what is loaded into vLLM's pages has its keys where values belong",
    ),
    Fault(
        "keys-for-values", "1", "sglang", "engines/sglang/scheduler/kv_pool.py",
        "out[:, layer, 1] = values[slots]", "out[:, layer, 1] = keys[slots]",
        (f"{SGLANG}::test_a_second_turn_after_a_hydrate_is_exact_too",),
        "a capture holds the keys twice",
    ),
    Fault(
        "first-block-speaks-for-all", "1", "vllm", "engines/vllm/scheduler/content_ids.py",
        "                if self._in_block.get(block.block_id) != number:\n                    return True\n",
        "                return self._in_block.get(block.block_id) != number\n",
        ("tests/engines/on_vllm/test_llm.py::test_what_siblings_sampled_alike_in_other_batches_is_not_exchanged",),
        "later blocks of equal tokens are taken from a sibling, with other bits",
    ),
    Fault(
        "a-walk-speaks-for-the-next", "1", "vllm", "engines/vllm/scheduler/content_ids.py",
        "        return before if same else Found()", "        return before",
        ("tests/engines/on_vllm/test_llm.py::test_a_sibling_right_after_another_goes_on_from_its_own",),
        "what one session found in the engine's blocks is taken for what another finds",
    ),
    Fault(
        "a-live-child-computes-less", "1", "vllm", "engines/vllm/scheduler/scheduler.py",
        "        if not run.hidden and local == run.want + 1:", "        if False:",
        (f"{VLLM}::test_a_live_child_computes_what_a_hydrated_one_does",),
        "a child finds the KV of the session's last token where that fills a block, one of a hydrated session does not",
    ),
    Fault(
        "one-group-shows-the-block", "1", "none", "engines/vllm/scheduler/content_ids.py",
        "bool(self.pool.get_cached_block(block_hash, self._groups))",
        "bool(self.pool.get_cached_block(block_hash, [0]))",
        ("tests/engines/test_vllm_guard.py::"
         "test_the_block_of_a_sessions_last_token_is_hidden_until_the_next_one_is_there_in_every_group",),
        "a block that only one cache group has counts as one that siblings read",
    ),
    Fault(
        "first-slot-speaks-for-all", "1", "sglang", "engines/sglang/scheduler/radix_cache.py",
        "own = self.side.contents.own_length(slots, record.chain) // self.page_size * self.page_size",
        "own = len(slots) if self.side.contents.own_length(slots[:1], record.chain) else 0",
        ("tests/engines/on_sglang/test_pressure.py::TestSglangPressure::"
         "test_what_one_sibling_sampled_and_another_read_is_not_exchanged",),
        "a session goes on with the bits that a sibling's equal tokens have",
    ),
    # --- laws 1 and 5 by cache group
    Fault(
        "window-a-token-short", "1", "fake", "core/cache.py",
        "range(max(0, num_kv - window + 1), num_kv)", "range(max(0, num_kv - window + 2), num_kv)",
        (f"{GROUPS}::TestHybrid::test_what_a_plan_needs_is_enough",),
        "the oldest token of a window is neither kept nor asked for",
    ),
    Fault(
        "nearest-state-for-own", "1", "fake", "repo/cover.py",
        "if point.token == num_kv), None)", "if point.token <= num_kv), None)",
        (f"{REPO_GROUPS}::test_every_point_that_is_named_goes_on_as_its_session_did",),
        "a point goes on with the state of an earlier token",
    ),
    Fault(
        "parts-in-reverse", "1", "fake", "engines/embedded/transfer.py",
        "blobs={group.name: tuple(islice(ids, group.num_blobs)) for group in self._states}",
        "blobs={group.name: tuple(islice(ids, group.num_blobs))[::-1] for group in self._states}",
        (f"{GROUPS}::TestHybrid::test_restored_kv_equals_captured_kv_byte_for_byte",),
        "a state names the blobs of its parts in the wrong order",
    ),
    Fault(
        "state-not-asked-for", "5", "fake", "engines/restoring.py",
        "if groups and plan.num_kv and plan.num_kv not in {point.token for point in plan.points}:",
        "if groups and plan.num_kv and not plan.points:",
        (f"{GROUPS}::TestHybrid::test_negative_control_a_state_of_another_token_changes_the_logprobs",),
        "a session without its state is taken for restored",
    ),
    Fault(
        "missing-group-passed-over", "5", "fake", "engines/restoring.py",
        "        if blobs or needed:\n", "        if blobs:\n",
        (f"{GROUPS}::TestTwoFullGroups::test_a_plan_that_lacks_a_group_is_refused_by_name",),
        "a plan without one group's bytes is loaded, and its memory is what it was",
    ),
    Fault(
        "written-by-every-rank", "1", "none", "engines/served/worker/rank_groups.py",
        "for rank in range(self._rank) for index", "for rank in () for index",
        (f"{SERVED_GROUPS}::test_what_ranks_read_and_write_is_byte_for_byte_the_same",),
        "what several ranks hold is written by all of them",
    ),
    Fault(
        "window-from-the-start", "1", "none", "engines/served/worker/host_cache.py",
        "        first = self.first(strip)\n        return self.tensors",
        "        first = self.start\n        return self.tensors",
        (f"{SERVED_GROUPS}::test_what_ranks_read_and_write_is_byte_for_byte_the_same",),
        "tokens of a window are taken from where a full group has them",
    ),
    Fault(
        "states-of-later-tokens", "3", "none", "engines/served/worker/host_cache.py",
        "for token, state in self.points.items() if token <= num_kv}", "for token, state in self.points.items()}",
        (f"{SERVED_GROUPS}::test_an_earlier_token_is_cut_in_every_group",),
        "a fork of an earlier token has the states of later ones",
    ),
    Fault(
        "one-table-for-all-groups", "1", "none", "engines/vllm/worker/copier.py",
        "for layout, blocks, tensor in zip(self._layouts, tables, tensors, strict=True):\n            layout.gather",
        "for layout, blocks, tensor in zip(self._layouts, tables[:1] * len(tables), tensors, strict=True):\n"
        "            layout.gather",
        (f"{SERVED_GROUPS}::test_each_group_is_copied_by_its_own_block_table",),
        "a group's KV is taken from another group's blocks",
    ),
    Fault(
        "first-group-speaks-for-all", "1", "none", "engines/vllm/scheduler/content_ids.py",
        "            for block in hit:\n", "            for block in hit[:1]:\n",
        (f"{SERVED_GROUPS}::test_a_block_of_any_group_that_is_not_the_sessions_own_is_foreign",),
        "a sibling's block of another group is taken for the session's",
    ),
    Fault(
        "states-not-followed", "7", "fake", "store/links.py",
        "points = value.points if isinstance(value, _GroupedSegment) else ()", "points = ()",
        (f"{REPO_GROUPS}::test_gc_fsck_and_a_rebuild_keep_the_states",),
        "gc takes the states of a live commit for garbage",
    ),
    Fault(
        "rebuilt-without-the-newer", "7", "fake", "store/rebuild.py",
        "    except NewerFormat:\n        raise\n    except ThawError:\n        return\n",
        "    except ThawError:\n        return\n",
        (f"{REPO_GROUPS}::test_upkeep_by_an_older_thaw_refuses_and_takes_nothing",),
        "a rebuild leaves out what a newer thaw wrote, and gc then takes it",
    ),
    Fault(
        "not-kept-restored-empty", "6", "fake", "engines/restoring.py",
        "    if plan.not_kept:\n        raise NotKept(plan.not_kept)\n", "    return\n",
        (f"{FAKE}::test_a_point_that_was_not_kept_is_refused_or_recomputed",),
        "a point without KV counts as restored",
    ),
    Fault(
        "window-written-anew", "4", "fake", "repo/commit.py",
        "rewrite=keeps_all(engine.info.groups)", "rewrite=True",
        (f"{REPO_GROUPS}::test_many_small_commits_do_not_write_their_window_anew",),
        "a commit writes its last window anew, without the states in it",
    ),
    # --- lineage
    Fault(
        "one-salt-for-all", "salt", "vllm", "engines/served/client/session.py",
        'f"{protocol.SALT}{own}"', 'f"{protocol.SALT}{salt or protocol.SALT}"',
        (f"{VLLM}::test_a_session_finds_nothing_of_another_that_read_the_same_prompt",),
        "sessions of different lineages share blocks in vLLM",
    ),
    # --- law 2, boundary
    Fault(
        "position-from-the-request", "2", "fake", "engines/embedded/generation.py",
        "position=len(session.tokens),", "position=lane.prompt_start + len(turn.logprobs),",
        (f"{FAKE}::test_cut_after_some_generated_tokens",),
        "a resumed completion draws as if it stood further on",
    ),
    Fault(
        "last-token-not-run-again", "2", "none", "repo/cut.py",
        "return min(max(num_tokens - 1, 0), state.num_kv)", "return min(num_tokens, state.num_kv)",
        ("tests/repo/test_repo_fork.py::test_every_interior_point_holds_its_tokens_and_all_but_the_last_ones_kv",),
        "a point inside a state keeps the KV of its last token, which is to run again",
    ),
    Fault(
        "tail-off-by-one", "2", "transformers", "engines/transformers/kv.py",
        "Tail(extent, index, 0, slot + 1, row, 1, page, False)",
        "Tail(extent, index, 0, max(slot, 1), row, 1, page, False)",
        ("tests/engines/test_attention.py::test_the_paged_path_equals_the_stock_model",),
        "a token that is decoded does not attend to itself",
    ),
    Fault(
        "window-read-one-token-late", "2", "transformers", "engines/transformers/single.py",
        "target[:] = slots[:, 0, a % PAGE : a % PAGE + b - a]",
        "target[:] = slots[:, 0, max(a % PAGE - 1, 0) : max(a % PAGE - 1, 0) + b - a]",
        (f"{KINDS}::test_the_stock_model_gives_the_same_logits_for_the_same_feeds",),
        "a layer with a window reads each token's neighbour",
    ),
    Fault(
        "state-of-an-earlier-token", "2", "transformers", "engines/transformers/states.py",
        "kv.points[kv.num_tokens][at : at + one.group.num_blobs]",
        "kv.points[min(kv.points)][at : at + one.group.num_blobs]",
        (f"{STATES}::test_twenty_random_cuts_equal_the_stock_model_that_stopped_there_too",),
        "a recurrent layer goes on from the first state that is kept",
    ),
    Fault(
        "oldest-column-kept", "2", "transformers", "engines/transformers/states.py",
        "layer.conv_states[0][0, :, 1:]", "layer.conv_states[0][0, :, :-1]",
        ("tests/engines/test_recurrent_form.py::test_the_bytes_of_a_state_are_its_layers_without_the_oldest_column",),
        "a convolution's state is that of one token earlier",
    ),
    Fault(
        "asked-state-let-go", "6", "transformers", "engines/embedded/pages.py",
        "self.points.items() if token >= oldest or token in self.asked", "self.points.items() if token >= oldest",
        (f"{STATES}::test_twenty_random_cuts_equal_the_stock_model_that_stopped_there_too",),
        "a state that was asked for is gone when the session goes on",
    ),
    Fault(
        "position-from-the-turn", "2", "vllm", "engines/served/worker/sampler.py",
        "position = self._num_prompt + len(self._output)", "position = self._extra.output_start + len(self._output)",
        ("tests/engines/on_vllm/test_sampling.py::test_where_the_request_was_cut_does_not_matter",),
        "a resumed completion draws what it drew at its beginning",
    ),
    Fault(
        "record-not-cut", "2", "vllm", "engines/served/worker/host_cache.py",
        "piece if piece.stop <= num_kv else replace(piece, length=num_kv - piece.start)\n",
        "piece\n",
        (f"{VLLM}::test_a_child_that_went_its_own_way_is_cut_like_any_other",),
        "a fork of an earlier token keeps the parent's KV of the later ones",
    ),
    # --- law 3, whole state
    Fault(
        "stop-string-forgotten", "3", "fake", "engines/session/turns.py",
        "stream = TextStream(codec, session.tokens[: turn.start], turn.sampling.stop)",
        "stream = TextStream(codec, session.tokens[: turn.start], ())",
        (f"{FAKE}::test_cut_at_a_stop_string",),
        "a resumed completion does not stop at its stop string",
    ),
    Fault(
        "penalties-begin-anew", "3", "transformers", "engines/embedded/generation.py",
        "output_start=turn.start,", "output_start=lane.prompt_start,",
        (f"{LLAMA}::test_cut_after_some_generated_tokens",),
        "penalties forget what the completion had before the cut",
    ),
    Fault(
        "min-tokens-begin-anew", "3", "vllm", "engines/served/worker/sampler.py",
        "if position - extra.output_start < extra.sampling.min_tokens",
        "if len(self._output) < extra.sampling.min_tokens",
        (f"{VLLM}::test_min_tokens_and_penalties_count_from_the_turns_start",),
        "the end is held back for min_tokens more after the cut",
    ),
    Fault(
        "grammar-begins-anew", "3", "vllm", "engines/vllm/scheduler/scheduler.py",
        "prior = list(request.all_token_ids[start:])", "prior = list(request.output_token_ids)",
        ("tests/engines/on_vllm/test_structured.py::test_a_resumed_completion_is_the_uninterrupted_one",),
        "structured output goes on as if nothing had been written",
    ),
    # --- law 4, copy-on-write
    Fault(
        "tail-page-shared", "4", "fake", "engines/embedded/pages.py",
        "            extent = self.factory.extent(1)\n            extent.copy_page(0, source, index, tail)\n"
        "            child.runs.append(PageRange(extent, 0, whole, 1))\n",
        "            child.runs.append(PageRange(source, index, whole, 1))\n",
        (f"{FAKE}::test_the_parent_is_untouched_by_what_its_children_do",
         f"{FAKE}::test_children_that_share_blocks_equal_children_that_own_copies"),
        "a child writes into the last page of its parent and siblings",
    ),
    Fault(
        "pages-of-a-sibling", "4", "transformers", "engines/transformers/kv.py",
        "if (known.extent is extent) and (known.first, known.count, known.place)",
        "if (known.first, known.count, known.place)",
        (f"{LLAMA}::test_in_one_batch_each_session_goes_on_from_its_own_document",),
        "rows of one batch attend to the pages of whoever came first",
    ),
    Fault(
        "tail-copied-short", "4", "transformers", "engines/transformers/kv.py",
        "own[..., :num_tokens, :] = other[..., :num_tokens, :]",
        "own[..., : num_tokens - 1, :] = other[..., : num_tokens - 1, :]",
        (f"{LLAMA}::test_children_that_share_blocks_equal_children_that_own_copies",),
        "a child's copy of the last page lacks a token",
    ),
    Fault(
        "child-in-the-parents-record", "4", "vllm", "engines/served/client/request.py",
        "    if not session.own:\n", "    if session.node is None:\n",
        (f"{VLLM}::test_children_differ_by_seed_and_the_seed_is_derived",),
        "a child extends the record of its parent and siblings",
    ),
    # --- law 5, fail closed
    Fault(
        "weights-not-compared", "5", "fake", "core/identity.py",
        '    _same("weights", stored.weights, running.weights)\n', "",
        (f"{FAKE}::test_a_mismatch_is_refused_naming_the_field_and_both_values",),
        "a snapshot of other weights is taken in",
    ),
    Fault(
        "tokenizer-not-compared", "5", "fake", "core/identity.py",
        '    _same("tokenizer", stored.tokenizer, running.tokenizer)\n', "",
        (f"{FAKE}::test_another_tokenizer_is_refused_even_with_recompute",),
        "a snapshot with another vocabulary is taken in",
    ),
    Fault(
        "dtype-not-compared", "5", "fake", "core/identity.py",
        'for field in ("architecture", "dtype"):', 'for field in ("architecture",):',
        (f"{FAKE}::test_a_mismatch_is_refused_naming_the_field_and_both_values",),
        "a snapshot of another dtype is taken in",
    ),
    Fault(
        "new-config-field-passed-over", "5", "fake", "core/identity.py",
        "stored.config.keys() | running.config.keys()", "stored.config.keys() & running.config.keys()",
        (f"{FAKE}::test_a_config_field_that_only_one_side_has_is_refused",),
        "a field of the config that only one side has is not looked at",
    ),
    Fault(
        "stale-policy", "5", "fake", "engines/embedded/engine.py",
        "return (live.epoch, live.policy) != (self._weights.epoch, self._weights.policy)",
        "return live.epoch != self._weights.epoch",
        (f"{FAKE}::test_a_live_session_of_an_old_policy_is_stale",),
        "a live session goes on with KV of the policy before",
    ),
    Fault(
        "small-step-unseen", "5", "transformers", "engines/transformers/backend.py",
        "            sample += guest.stamp(self._loaded.owner, self._module)\n", "            pass\n",
        ("tests/engines/test_attach.py::test_a_step_too_small_for_the_sampled_digest_is_noticed",),
        "a training step that changes few weights is not noticed",
    ),
    Fault(
        "rope-left-out", "5", "transformers", "engines/hf/config.py",
        "dropped = _NOT_FUNCTION | _said_twice(config)",
        'dropped = _NOT_FUNCTION | _said_twice(config) | {"rope_parameters"}',
        ("tests/engines/test_identity.py::test_another_rope_is_named",),
        "two models that differ in their rope alone are one",
    ),
    Fault(
        "old-weights-served", "5", "vllm", "engines/vllm/worker/worker.py",
        "        if record.epoch != now:\n            raise StaleSession(",
        "        if record.epoch > now:\n            raise StaleSession(",
        (f"{VLLM}::test_weights_changed_in_place_are_noticed",),
        "a session goes on with KV of weights that are gone",
    ),
    Fault(
        "old-weights-served-by-sglang", "5", "sglang", "engines/sglang/scheduler/weights_epoch.py",
        "    if record.kept.epoch != epoch:\n", "    if record.kept.epoch > epoch:\n",
        (f"{SGLANG}::test_weights_changed_in_place_are_noticed",),
        "a session goes on with KV of weights that are gone",
    ),
    # --- law 6, proof
    Fault(
        "short-load-accepted", "6", "fake", "engines/embedded/transfer.py",
        "    if kv.num_tokens != plan.num_kv:\n", "    if kv.num_tokens > plan.num_kv:\n",
        ("tests/engines/test_embedded.py::test_a_load_that_brings_too_little_is_not_hit",),
        "a restore that brought too little counts as one",
    ),
    Fault(
        "count-not-the-engines", "6", "vllm", "engines/served/client/hydrating.py",
        "cached = answer.local + answer.external", "cached = want",
        ("tests/engines/on_vllm/test_interruptions.py::"
         "test_a_restore_that_the_engine_counts_short_is_not_hit",),
        "the proof says what was wanted, not what the engine counted",
    ),
    # --- law 7, durable
    Fault(
        "lost-fsync", "7", "none", "data/files.py",
        "            os.fsync(fd)\n            if not overwrite", "            if not overwrite",
        ("tests/data/test_packs.py::"
         "test_a_pack_is_on_disk_before_it_has_its_name_and_its_name_before_it_returns",),
        "a pack has its name before its bytes are on disk",
    ),
    Fault(
        "lost-fsync-of-the-folder", "7", "none", "data/files.py",
        "            finished = True\n            sync_folder(path.parent)\n", "            finished = True\n",
        ("tests/data/test_packs.py::"
         "test_a_pack_is_on_disk_before_it_has_its_name_and_its_name_before_it_returns",),
        "a pack's name may be lost in a power cut after its commit returned",
    ),
    Fault(
        "commits-not-synced", "7", "none", "store/db.py",
        "{'FULL' if durable else 'NORMAL'}", "{'NORMAL' if durable else 'OFF'}",
        ("tests/store/test_store.py::test_what_makes_a_commit_visible_is_synced",),
        "a commit that returned may be lost in a power cut",
    ),
    Fault(
        "commit-removes-its-packs", "7", "none", "store/transaction.py",
        "        self._remove(redundant)\n", "        self._remove(self._leased)\n",
        ("tests/store/test_store.py::test_a_commit_that_returned_is_there_for_another_process",),
        "the clean-up of a failed commit runs after one that returned",
    ),
    Fault(
        "branch-moved-unseen", "7", "none", "repo/commit.py",
        "    return None if context.store.ref(request.branch) is None else request.parent\n", '    return "any"\n',
        ("tests/repo/test_repo_commit.py::test_of_two_committers_one_wins_and_the_other_keeps_its_commit",),
        "of two who commit to a branch the later one drops the other's commit from it",
    ),
    # --- law 8, own session only
    Fault(
        "files-for-everybody", "8", "none", "data/files.py",
        "os.O_CLOEXEC, 0o600)", "os.O_CLOEXEC, 0o644)",
        ("tests/data/test_packs.py::test_a_pack_is_private_and_has_no_temporary_beside_it",
         "tests/store/test_store.py::test_files_are_for_their_owner_only"),
        "other users read a session's KV",
    ),
    Fault(
        "mail-for-everybody", "8", "none", "engines/served/mailbox.py",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)", "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)",
        ("tests/engines/test_served_protocol.py::test_mail_is_for_its_owner_only",),
        "other users read plans and answers",
    ),
    Fault(
        "anybody-may-switch", "8", "none", "engines/served/mailbox.py",
        'if message.for_owner and not (self.folder / "grants" / message.id).exists():',
        'if message.for_owner and not (self.folder / "grants").exists():',
        ("tests/engines/test_served_protocol.py::test_what_is_about_everybodys_sessions_needs_a_grant_in_the_mail",),
        "who has the API key alone changes everybody's sessions",
    ),
    # --- law 9, good guest
    Fault(
        "failing-load-ends-the-engine", "9", "vllm", "engines/vllm/worker/worker.py",
        "            guarded(partial(self._do_mapped, job), partial(self._failed, job))\n",
        "            self._do_mapped(job)\n",
        ("tests/engines/on_vllm/test_interruptions.py::test_a_load_that_fails_ends_its_own_request_alone",),
        "a load that fails takes vLLM with it",
    ),
    Fault(
        "failing-match-ends-the-engine", "9", "none", "engines/vllm/scheduler/scheduler.py",
        "found = guarded(partial(self._match, request, run, local), partial(self._stop, run))",
        "found = self._match(request, run, local)",
        ("tests/engines/test_vllm_guard.py::test_what_nobody_foresaw_ends_the_one_request",),
        "what nobody foresaw in one request's session takes vLLM with it",
    ),
    Fault(
        "failing-token-ends-the-engine", "9", "none", "engines/sglang/scheduler/sampler.py",
        "token = guarded(partial(row.pick, host_RV[i], int(seq_lens[index])), row.failed)",
        "token = row.pick(host_RV[i], int(seq_lens[index]))",
        ("tests/engines/test_sglang_guard.py::test_a_token_that_cannot_be_chosen_costs_its_own_request",),
        "a token that cannot be chosen takes SGLang with it",
    ),
    Fault(
        "pins-outlive-a-reset", "9", "vllm", "engines/vllm/scheduler/scheduler.py",
        "        self.pins.reset()\n", "        self.pins.release()\n",
        ("tests/engines/on_vllm/test_operators.py::"
         "test_a_reset_with_the_connector_ends_the_pins_and_works_the_second_time",),
        "vLLM's own reset of its prefix cache fails for as long as somebody pins",
    ),
    Fault(
        "pins-outlive-a-flush", "9", "sglang", "engines/sglang/scheduler/scheduler.py",
        "        self.pins.lost()\n", "",
        ("tests/engines/on_sglang/test_pressure.py::TestSglangPressure::"
         "test_sglangs_own_flush_works_with_sessions_parked_and_pinned",),
        "pins are kept of a tree that SGLang has thrown away",
    ),
    # --- gc, match, the pool, receipts
    Fault(
        "gc-ignores-leases", "gc", "none", "store/mark.py",
        "for root in lease.roots}", "for root in ()}",
        ("tests/store/test_gc.py::test_a_lease_keeps_its_roots",),
        "gc takes a commit away from whoever reads it",
    ),
    Fault(
        "gc-takes-the-hidden-state", "gc", "none", "store/links.py",
        "(hidden,) if hidden else ())", "())",
        ("tests/repo/test_repo_commit.py::"
         "test_a_commit_on_no_branch_survives_gc_as_long_as_reflogs_are_kept",),
        "gc frees the blob of a state's last hidden state",
    ),
    Fault(
        "windows-not-chained", "match", "none", "core/prefix.py",
        "out.append(extend(out[-1],", "out.append(extend(out[0],",
        ("tests/core/test_core_golden.py::test_prefix_hashes_are_as_they_were",
         "tests/core/test_core_golden.py::test_a_prefix_hash_says_model_tokens_and_order"),
        "the hash of a prefix forgets all but its last window",
    ),
    Fault(
        "ids-of-other-namespaces", "8", "none", "store/objects.py",
        "(CommitId(one) for (one,) in rows if read_namespace(connection, one) == namespace)",
        "(CommitId(one) for (one,) in rows)",
        (f"{NAMESPACES}::test_thousands_of_guesses_find_nothing",),
        "the first digits of another tenant's commit find it",
    ),
    Fault(
        "points-of-other-namespaces", "8", "none", "repo/resolve.py",
        "        return _checked(store, point)\n", "        return point\n",
        (f"{NAMESPACES}::test_a_point_is_not_put_together_of_ones_own_commit_and_anothers_state",),
        "a point that a caller made up leads to another tenant's session",
    ),
    Fault(
        "namespaces-in-one-chain", "8", "none", "core/prefix.py",
        "    out = [root(model_id, namespace)]\n", "    out = [root(model_id)]\n",
        (f"{NAMESPACES}::test_match_finds_ones_own_prefixes_alone",),
        "a match in a namespace looks among the prefixes of the default one",
    ),
    Fault(
        "equal-bytes-of-others-save-time", "8", "none", "store/transaction.py",
        "stored = set[str]() if self._store.namespace else self._stored()", "stored = self._stored()",
        (f"{NAMESPACES}::test_what_others_have_stored_shows_in_no_commit",),
        "a tenant sees by a commit whether others have said the same",
    ),
    Fault(
        "seed-by-place-in-the-chunk", "pool", "fake", "pool/schedule/batch.py",
        "derive(point.seed, point.at, job.index)",
        "derive(point.seed, point.at, chunk.jobs.index(job))",
        (f"{POOL}::test_a_spread_round_runs_in_several_workers_with_the_same_seeds",
         "tests/pool/test_pool_parts.py::test_a_batch_without_memory_begins_again_in_halves"),
        "a branch that is begun again in a smaller batch has another seed",
    ),
    Fault(
        "dead-workers-branches-fail", "pool", "fake", "pool/schedule/scheduler.py",
        "return self._again(chunk, error, pieces=len(chunk.jobs) if died_before else 1, avoid=worker.name)\n",
        "return Verdict([], [(job, _as_ours(error)) for job in chunk.jobs])\n",
        (f"{POOL}::test_a_worker_that_dies_loses_no_branch",),
        "the branches of a worker that died are lost",
    ),
    Fault(
        "answered-twice", "pool", "fake", "pool/round.py",
        "            if self._results[result.index] is not None:\n",
        "            if self._results[result.index] is result:\n",
        ("tests/pool/test_pool_parts.py::test_a_branch_has_one_result_however_often_it_is_settled",),
        "a branch that was stopped is answered a second time",
    ),
    Fault(
        "interval-not-recomputed", "receipt", "none", "receipt/verify.py",
        'for field in ("value", "low", "high"):', 'for field in ("value",):',
        ("tests/bench/test_receipt.py::test_a_changed_figure_is_found_even_under_a_new_digest",),
        "a receipt holds whose interval was changed",
    ),
    # --- chat
    Fault(
        "answer-tokenised-again", "chat", "fake", "repo/align.py",
        "or j == len(wanted) or answer is None:", "or j == len(wanted) or True:",
        ("tests/repo/test_chat.py::test_a_sampled_answer_keeps_its_tokens_and_log_probabilities",),
        "the next chat turn takes the tokenizer's ids for an answer, and not those that were sampled",
    ),
    Fault(
        "the-day-of-today", "chat", "fake", "repo/chat.py",
        "        if settings.moment is not None:\n", "        if settings.moment is None:\n",
        ("tests/repo/test_chat.py::test_the_day_on_which_a_conversation_began_stays",),
        "the time that a template read is not recorded",
    ),
    Fault(
        "message-left-out-unseen", "chat", "none", "repo/said.py",
        "if number not in (found or ()) and", "if found is None and",
        ("tests/repo/test_chat_templates.py::test_a_message_that_the_template_leaves_out_is_an_error",),
        "a message whose role the template does not know is lost",
    ),
    Fault(
        "mark-that-is-a-word", "chat", "none", "repo/marks.py",
        " if stem not in taken)", ")",
        ("tests/repo/test_chat_nothing_lost.py::test_messages_may_say_anything_and_keep_their_headers",),
        "what stands in for a text occurs in another, and that message loses its header",
    ),
    Fault(
        "result-said-along-with-the-call", "chat", "none", "repo/chat.py",
        "            if lost is None:\n", "            if True:\n",
        ("tests/repo/test_chat_nothing_lost.py::test_results_that_are_said_along_with_the_calls_are_not_lost",),
        "what a template says of a tool's result along with the call is lost behind a call that was sampled",
    ),
    Fault(
        "gone-back-to-nothing", "chat", "fake", "repo/session.py",
        "if failed and not self._closed and", "if not failed and not self._closed and",
        ("tests/repo/test_chat.py::test_a_chat_that_the_engine_refuses_leaves_the_session_as_it_was",),
        "a chat that the engine refuses has dropped what it was to replace",
    ),
    # --- the gateway
    Fault(
        "prefix-read-twice", "gateway", "none", "gateway/place.py",
        "            if coming is not None and num_coming >= known + WORTH_WAITING:\n",
        "            if coming is not None and num_coming < 0:\n",
        (f"{GATEWAY}/test_together.py::test_a_prefix_at_first_sight_is_read_once",),
        "requests that begin alike do not wait for one another",
    ),
    Fault(
        "anothers-open-session", "8", "none", "gateway/live.py",
        "return entry.namespace == namespace and (entry.chat or not chat)", "return entry.chat or not chat",
        (f"{GATEWAY}/test_tenants.py::test_anothers_prefix_is_read_as_if_it_were_not_there",),
        "a tenant goes on from a session that another one has open",
    ),
    Fault(
        "ready-before-it-is-read", "gateway", "none", "gateway/job.py",
        "                if delta.token_ids:\n", "                if delta is not None:\n",
        (f"{GATEWAY}/test_together.py::test_who_waits_goes_on_when_the_first_one_fails",),
        "who waits forks a session whose prompt was stopped half way",
    ),
    Fault(
        "billing-line-rendered", "gateway", "none", "gateway/dialects/messages.py",
        "kept = [block for block in blocks if not block.lstrip().startswith(BILLING)]", "kept = blocks",
        (f"{GATEWAY}/test_messages.py::test_a_billing_line_and_rolling_marks_change_no_prefix",),
        "a line that changes with every request stands before everything",
    ),
    Fault(
        "answers-as-told-forgotten", "gateway", "none", "gateway/place.py",
        "        return (*self.entry.tokens, *again)\n", "        return (*view.tokens, *again[:0])\n",
        (f"{GATEWAY}/test_gateway_chat.py::test_an_answer_that_is_told_in_other_tokens_keeps_those_that_were_sampled",),
        "an open session is known by its sampled tokens alone",
    ),
    Fault(
        "one-seed-for-all", "gateway", "none", "gateway/place.py",
        "seed = fresh_seed() if asked.sampling.seed is None else asked.sampling.seed",
        "seed = 1 if asked.sampling.seed is None else asked.sampling.seed",
        (f"{GATEWAY}/test_responses.py::test_two_with_one_previous_response_are_two_children",),
        "two children of one response say the same",
    ),
    Fault(
        "row-after-the-last-event", "7", "none", "gateway/job.py",
        "        await self._keep(outcome)\n        self.outcome.set_result(outcome)\n",
        "        self.outcome.set_result(outcome)\n        await asyncio.sleep(1)\n        await self._keep(outcome)\n",
        (f"{GATEWAY}/test_process.py::test_what_was_acknowledged_is_there_after_kill_9_and_goes_on",),
        "a response is acknowledged before it is on disk",
    ),
    # --- LangGraph
    Fault(
        "tags-dropped-first", "7", "none", "integrations/langgraph/saver.py",
        "            self._file.delete_thread(thread_id)\n",
        "            keeping.release(self.repo.store, thread_id, named)\n"
        "            self._file.delete_thread(thread_id)\n",
        (f"{LANGGRAPH}/test_kill.py::test_no_checkpoint_names_freed_kv_after_a_kill",),
        "a killed process leaves a checkpoint whose KV gc frees",
    ),
    Fault(
        "pending-writes-not-kept", "LangGraph", "none", "integrations/langgraph/saver.py",
        "named = points_in([value for _, value in writes])", "named = points_in(task_id)",
        (f"{LANGGRAPH}/test_saver.py::test_what_a_failed_step_wrote_is_kept",),
        "an answer that waits for another node to succeed loses its KV",
    ),
    Fault(
        "every-point-fits", "LangGraph", "none", "integrations/langgraph/messages.py",
        'intact=message.response_metadata[KEY].get("digest") == digests[i]', "intact=True",
        (f"{LANGGRAPH}/test_chat_model.py::test_a_message_that_was_edited_reaches_a_gateway",),
        "a message that was edited is never seen by the model behind a gateway",
    ),
    Fault(
        "parent-not-held", "LangGraph", "none", "integrations/langgraph/local.py",
        "while parent is not None and self._num_tokens(parent) > keep:", "while False:",
        (f"{LANGGRAPH}/test_time_travel.py::test_another_system_message_reads_the_conversation_again",),
        "a commit keeps the KV of a conversation that it does not continue",
    ),
)  # fmt: skip


# --- a tree to seed


class Broken(Exception):
    """Why a run shows nothing."""


@contextmanager
def copied(tree: Path) -> Iterator[Path]:
    """A copy of what git knows of the tree, changed files and new ones as they stand; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="seeded-") as place:
        copy = Path(place) / "tree"
        listed = ["git", "-C", str(tree), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
            if name and (tree / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, copy / name)
        yield copy


@contextmanager
def seeded(clean: Path, fault: Fault) -> Iterator[Path]:
    """A copy of `clean` with the fault in it. Raises `Broken` where it does not apply, or is no Python."""
    copy = clean.with_name("seeded")
    shutil.copytree(clean, copy)
    try:
        file = copy / "src" / "thaw" / fault.file
        text = file.read_text("utf-8")
        if text.count(fault.old) != 1:
            raise Broken(f"what it changes stands {text.count(fault.old)} times in {fault.file}; write it anew")
        text = text.replace(fault.old, fault.new)
        compile(text, fault.file, "exec")
        file.write_text(text, "utf-8")
        yield copy
    finally:
        shutil.rmtree(copy)


# --- running tests


@dataclass(frozen=True)
class Ran:
    """What became of each test, by its id: "" where it passed, what was wrong where it failed. Others did not run."""

    code: int
    tests: dict[str, str]
    output: str


def python_of(engine: str, environments: Path) -> Path:
    """Raises `Broken` where the environment was not made."""
    python = environments / PYTHONS[engine] / "bin" / "python"
    if not python.exists():
        raise Broken(f"there is no {PYTHONS[engine]} in {environments}: make {PYTHONS[engine]}")
    return python


def run_tests(python: Path, copy: Path, tests: Sequence[str], *, stop_at_first: bool) -> Ran:
    """pytest over `tests` in the copy, on the copy's own code. Raises `Broken`."""
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in NOT_HANDED_ON:
        environment.pop(name, None)
    where = finish([python, "-c", "import thaw; print(thaw.__file__)"], copy, environment)[1].strip()
    if Path(where) != copy / "src" / "thaw" / "__init__.py":
        raise Broken(f"tests would run on {where}, not on the copy")
    report, place = copy.parent / "report.xml", copy.parent / "run"
    report.unlink(missing_ok=True)
    options = [*OPTIONS, f"--basetemp={place}", f"--junitxml={report}"]
    code, output = finish([python, "-m", "pytest", *options, *["-x"] * stop_at_first, *tests], copy, environment)
    return Ran(code, read(report, tests) if report.exists() else {}, output)


def finish(command: Sequence[object], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output. Raises `Broken` when it takes too long; all that it started is ended then."""
    with subprocess.Popen(
        [str(part) for part in command], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Broken(f"the tests did not end in {LIMIT_S:.0f} s") from None
            raise
    return process.returncode, output


def read(report: Path, tests: Sequence[str]) -> dict[str, str]:
    """What junit's report says of each test that ran; an error outside of a test itself counts as not run."""
    files, found = {test.partition("::")[0] for test in tests}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        failure = case.find("failure")
        if failure is not None or (case.find("error") is None and case.find("skipped") is None):
            found[node_of(case, files)] = "" if failure is None else failure.get("message") or "failed"
    return found


def node_of(case: ElementTree.Element, files: Collection[str]) -> str:
    """The test's id in one of `files`, by the dotted name of its module and class."""
    dotted, name = f"{case.get('classname')}.", str(case.get("name"))
    modules = {file: file.removesuffix(".py").replace("/", ".") + "." for file in files}
    file = next(file for file, module in modules.items() if dotted.startswith(module))
    return "::".join([file, *filter(None, dotted.removeprefix(modules[file]).split(".")), name])


def is_absent(test: str, output: str) -> bool:
    """Whether pytest said that it does not find it."""
    return any("not found: " in line and line.endswith(test) for line in output.splitlines())


def of(selection: str, node: str) -> bool:
    """Whether pytest takes the test for `selection`: a file, a class or a function with all its parameters."""
    return node == selection or node.startswith((f"{selection}::", f"{selection}["))


# --- what is shown


def run_unseeded(python: Path, clean: Path, faults: Sequence[Fault]) -> tuple[set[str], float]:
    """All tests of these faults: which there are, and the seconds it took. Raises `Broken` unless those pass."""
    began = time.monotonic()
    wanted = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    ran = run_tests(python, clean, wanted, stop_at_first=False)
    if ran.code == USAGE_ERROR and (absent := [test for test in wanted if is_absent(test, ran.output)]):
        wanted = [test for test in wanted if test not in absent]
        ran = run_tests(python, clean, wanted, stop_at_first=False) if wanted else Ran(0, {}, "")
    if ran.code:
        raise Broken(f"unseeded the tests do not pass (exit code {ran.code}):\n{ran.output[-3000:]}")
    return {test for test in wanted if any(of(test, node) for node in ran.tests)}, time.monotonic() - began


def try_fault(python: Path, clean: Path, fault: Fault, there: Collection[str]) -> Outcome:
    """With those of its tests that are `there`, and pass unseeded."""
    began = time.monotonic()
    caught = error = ""
    try:
        tests = [test for test in fault.tests if test in there]
        if not tests:
            raise Broken(f"{fault.tests[0]} was not run: skipped, deselected or gone")
        with seeded(clean, fault) as copy:
            ran = run_tests(python, copy, tests, stop_at_first=True)
        caught = caught_by(ran)
    except (Broken, SyntaxError) as broken:
        error = str(broken)
    return Outcome(fault, caught, error, time.monotonic() - began)


def caught_by(ran: Ran) -> str:
    """The test that failed; nothing where all passed. Raises `Broken` where tests failed to run."""
    failed = {node: why for node, why in ran.tests.items() if why}
    if ran.code == 0 and not failed:
        return ""
    if ran.code != 1 or not failed:
        raise Broken(f"pytest ended with {ran.code}, and no test failed by itself:\n{ran.output[-2000:]}")
    node, why = next(iter(failed.items()))
    if any(word in why for word in NOT_A_CATCH):
        raise Broken(f"{node} failed with {why[:300]}")
    return node


def show(faults: Sequence[Fault], tree: Path, environments: Path) -> list[Outcome]:
    """Try each of them, engine by engine, and print what came of it."""
    outcomes = []
    with copied(tree) as clean:
        for engine in (engine for engine in PYTHONS if any(fault.engine == engine for fault in faults)):
            mine = [fault for fault in faults if fault.engine == engine]
            try:
                python = python_of(engine, environments)
                there, seconds = run_unseeded(python, clean, mine)
                print(f"· {engine}: unseeded all pass, {seconds:.0f} s", flush=True)
            except Broken as broken:
                outcomes += [Outcome(fault, "", str(broken).splitlines()[0], 0.0) for fault in mine]
                print(f"· {engine}: {broken}", flush=True)
                continue
            for fault in mine:
                outcomes.append(try_fault(python, clean, fault, there))
                print(row(outcomes[-1]), flush=True)
    return outcomes


def row(outcome: Outcome) -> str:
    fault = outcome.fault
    return f"{fault.name:29} {fault.law:8} {fault.file:33} {outcome.seconds:4.0f} s  {outcome.verdict}"


def counts(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Faults that were caught, by law and by engine: for a receipt."""
    caught = [outcome.fault for outcome in outcomes if outcome.caught]
    laws = Counter(f"law-{fault.law}" if fault.law.isdecimal() else fault.law for fault in caught)
    return {
        "caught": {"seeded": len(outcomes), "caught": len(caught)},
        "laws": dict(laws),
        "engines": dict(Counter(fault.engine for fault in caught)),
    }


def chosen(names: Sequence[str], engine: str) -> list[Fault]:
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        sys.exit(f"there is no fault {', '.join(sorted(unknown))}: --list shows those that there are")
    return [f for f in FAULTS if f.name in (names or (f.name,)) and engine in ("all", f.engine)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="faults; all of them, unless some are named")
    parser.add_argument("--list", action="store_true", help="print the faults and do nothing")
    parser.add_argument("--engine", default="all", choices=["all", *PYTHONS], help="only those of one engine's tests")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to seed")
    parser.add_argument("--environments", type=Path, default=ROOT, help="where .venv and the others are")
    options = parser.parse_args(arguments)
    faults = chosen(options.names, options.engine)
    if options.list:
        print(*(f"{f.name:29} {f.law:8} {f.engine:13} {f.what}" for f in faults), sep="\n")
        return 0
    outcomes = show(faults, options.tree.resolve(), options.environments.resolve())
    caught = sum(bool(outcome.caught) for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} faults were caught")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
