"""A model whose files are not whole is refused by name, before SGLang starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from damaged_models import DAMAGED, damaged

pytest.importorskip("sglang")

from thaw import load_engine
from thaw.core.errors import IncompleteModel


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_model_is_refused_by_name_before_sglang_starts(
    tiny_model: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    folder = damaged(tiny_model("llama", dtype="float32", head_dim=64), tmp_path / "m", what)
    with pytest.raises(IncompleteModel, match=DAMAGED[what][1]):
        load_engine("sglang", model=str(folder), max_model_len=512)
