"""SGLang loads a stored model straight from packs: the same bits as from its files, and errors name what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weights_models import (
    CHANGES,
    LAYER,
    flip,
    forged,
    goes_on_without_the_models_files,
)

from thaw.core.errors import ThawError
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.engines.sglang.client import boot as client
from thaw.store import Store
from thaw.weights import WeightsBook

pytest.importorskip("sglang")

OPTIONS: dict[str, Any] = {"max_total_tokens": 2048}


def boot(model: Path, **more: Any) -> Engine:
    return load_engine("sglang", model=str(model), **{**OPTIONS, **more})


def test_a_folder_without_the_models_files_goes_on_bitwise(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    goes_on_without_the_models_files(boot, tiny_model("llama", dtype="bfloat16", head_dim=64), tmp_path)


def words_of_failed_boot(model: Path) -> str:
    """The error, and the log of the server, which goes when it ends."""
    logs, end = [], client.OwnServer.end

    def keep_log(server: client.OwnServer) -> None:
        logs.append(Path(server._log.name).read_text(errors="replace"))
        end(server)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.OwnServer, "end", keep_log)
        with pytest.raises(ThawError) as failed:
            boot(model)
    return "\n".join([str(failed.value), *logs])


def test_a_flipped_byte_in_a_pack_is_named(tmp_path: Path, book_of_base: WeightsBook) -> None:
    blob = book_of_base.show("base").manifest.tensors[LAYER].blob
    assert blob is not None
    model = book_of_base.model("base")
    with Store.open(tmp_path / "repo") as store:
        flip(store, blob)
    assert f"tensor {LAYER}: pack" in words_of_failed_boot(model)


def test_a_set_that_is_not_its_config_is_named(book_of_base: WeightsBook) -> None:
    for change, words in CHANGES.values():
        assert re.search(words, words_of_failed_boot(forged(book_of_base, change)))
