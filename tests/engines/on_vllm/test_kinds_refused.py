"""Kinds of cache that vLLM does not run, or not so that a session could go on exactly: each is refused by name before
an engine starts. What the table of kinds says of them (`kind_models.ON_VLLM`) is what is tested here."""

from __future__ import annotations

from pathlib import Path

import pytest

vllm = pytest.importorskip("vllm")
if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < (0, 32):
    pytest.skip("older releases refuse more, in words of their own", allow_module_level=True)

from vllm_shapes import SHAPES  # noqa: E402

from kind_models import ON_VLLM, make_kind_model  # noqa: E402
from thaw.core.errors import Unsupported  # noqa: E402
from thaw.engines import load_engine  # noqa: E402

REFUSED = {
    "gemma4_text": r"KV differs in more than its window \(sliding: .*heads of 16.*full: .*heads of 32",
    "mimo_v2_flash": r"KV differs in more than its window \(full: .*sliding: ",
    "minicpm3": r"minicpm3: vLLM keeps keys and values where other engines keep its latents",
    "bamba": r"a hybrid model .*layers of linear_attention",
}
"""Bamba has no class of its own in vLLM 0.32."""


@pytest.mark.parametrize("arch", REFUSED)
def test_what_cannot_go_on_exactly_is_refused_by_name(arch: str, tmp_path: Path) -> None:
    folder = make_kind_model(arch, tmp_path / arch, dtype="bfloat16")
    with pytest.raises(Unsupported, match=REFUSED[arch]):
        load_engine("vllm", model=str(folder), enforce_eager=True, max_model_len=1024)


@pytest.mark.parametrize("arch", ["gemma2", "lfm2", "lfm2_moe"])
def test_a_head_that_vllm_would_not_read_is_refused_by_name(arch: str, tmp_path: Path) -> None:
    """Its answers would be of the embedding, and those of other engines of the head."""
    folder = make_kind_model(arch, tmp_path / arch, dtype="bfloat16", **SHAPES[arch] | {"tie_word_embeddings": False})
    with pytest.raises(Unsupported, match=rf"{arch} with a head of its own \(tie_word_embeddings=false\)"):
        load_engine("vllm", model=str(folder), enforce_eager=True, max_model_len=1024)


def test_the_table_says_so() -> None:
    assert {arch for arch, said in ON_VLLM.items() if said == "refused by name"} == REFUSED.keys()
    assert set(ON_VLLM.values()) == {"tested on 0.32", "refused by name", "starts in 0.32; not run with thaw"}
