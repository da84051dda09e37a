"""The demo's receipt: what one run measured, with the checks that `thaw receipt verify` counts again."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from thaw.core.ids import digest
from thaw.data.files import storage_errors
from thaw.engines.registry import kind_of
from thaw.receipt import Arm, Hits, Model, Receipt, Round, Term, all_hit, dumps, equal_outputs, make, median, quotient
from thaw.receipt.machine import software, this_machine

if TYPE_CHECKING:
    from thaw.demo.events import Answered
    from thaw.demo.story import DemoOptions, Story

READ, HYDRATE = "read", "hydrate"


def write(story: Story, options: DemoOptions, path: Path) -> Receipt:
    """Seal the receipt of `story` into `path`."""
    receipt = of(story, options)
    with storage_errors(path, "write"):
        path.write_bytes(dumps(receipt))
    return receipt


def of(story: Story, options: DemoOptions) -> Receipt:
    """The receipt: one round an arm, since the demo tells its story once; `thaw bench fork` repeats and compares."""
    return make(
        kind="demo",
        command="thaw demo",
        versions=software(*kind_of(story.loaded.engine).software),
        machine=this_machine(None if story.loaded.device == "cpu" else story.loaded.device),
        model=Model(
            name=Path(story.loaded.model).name or story.loaded.engine,
            architecture=story.described.architecture,
            dtype=story.described.dtype,
            identity=story.described.identity,
            kv_token_nbytes=story.described.kv_token_nbytes,
        ),
        parameters={
            "engine": story.loaded.engine,
            "num_tokens": story.committed.num_tokens,
            "num_children": len(story.children),
            "max_tokens": options.max_tokens,
            "parent_max_tokens": options.parent_max_tokens,
            "seed": options.seed,
        },
        arms=[_read(story), _hydrate(story)],
        derived=[
            median("prefill", "first token after reading the document", "s", Term(arm=READ, value="first_token_s")),
            median("hydrated", "first tokens of all, hydrated", "s", Term(arm=HYDRATE, value="first_token_s")),
            quotient(
                "sooner", "how many times sooner", "×",
                Term(arm=READ, value="first_token_s"), Term(arm=HYDRATE, value="first_token_s"),
            ),
        ],
        checks=[
            all_hit("all-hit", "the engine found every token of the document in its cache", HYDRATE),
            equal_outputs("tokens", "the resumed parent's tokens", HYDRATE, READ, "token_ids", promised=True),
            equal_outputs("logprobs", "their log probabilities, bit for bit", HYDRATE, READ, "logprobs", promised=True),
        ],
    )  # fmt: skip


def _read(story: Story) -> Arm:
    first = Round(
        pair=0,
        values={
            "first_token_s": story.prefill_first_token_s,
            "commit_s": story.committed.seconds,
            "commit_nbytes": float(story.committed.nbytes),
        },
        stages_s={"prefill": story.read.seconds, "question": story.parent.ttft_s},
        outputs=_outputs(story.parent),
    )
    text = "A process that has the model loaded reads the document and then answers one question, uninterrupted."
    return Arm(name=READ, title="read the document, one question", text=text, rounds=(first,))


def _hydrate(story: Story) -> Arm:
    children = story.children
    first = Round(
        pair=0,
        values={"first_token_s": story.hydrate_first_token_s, "nbytes": float(story.hydrated.proof.nbytes)},
        stages_s={"hydrate": story.hydrated.seconds, "question": max(child.ttft_s for child in children)},
        hits=Hits(
            num_prompt_tokens=sum(child.num_prompt_tokens for child in children),
            num_wanted_tokens=story.hydrated.num_kv * len(children),
            num_cached_tokens=sum(child.num_cached_tokens for child in children),
            num_prefilled_tokens=sum(child.num_prefilled_tokens for child in children),
        ),
        outputs=_outputs(story.resumed),
    )
    text = "Another process that has the model loaded hydrates the commit and answers all questions in one batch."
    return Arm(name=HYDRATE, title="hydrate, all questions at once", text=text, rounds=(first,))


def _outputs(said: Answered) -> dict[str, str]:
    """Digests of what came out: token ids as 32-bit, log probabilities as 64-bit little-endian numbers."""
    return {
        "token_ids": digest(struct.pack(f"<{len(said.token_ids)}I", *said.token_ids)),
        "logprobs": digest(struct.pack(f"<{len(said.logprobs)}d", *said.logprobs)),
    }
