"""Load against prefill on this machine: a quick measurement of the read path, and an estimate of the prefill.

Every figure says whether it was measured or estimated, and from what. Takes a few seconds and 64 MiB of disk, in a
temporary folder that is removed again.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from thaw.data.files import drop_cache
from thaw.data.pack import PackItem, read_blobs, write_pack
from thaw.doctor.report import Figure, ModelReport
from thaw.engines.base import Engine

PROBE_NBYTES, ITEM_NBYTES = 64 << 20, 1 << 20
PROBE_TOKENS = 512
ROUNDS = 3
MIB = 1 << 20


def storage(folder: Path) -> list[Figure]:
    """Rates of thaw's own write and read path (hashing included) in a temporary folder inside `folder`."""
    with tempfile.TemporaryDirectory(prefix=".thaw-doctor-", dir=folder) as name:
        packs = Path(name)
        block = os.urandom(ITEM_NBYTES - 4)
        items = [_item(i, block) for i in range(PROBE_NBYTES // ITEM_NBYTES)]
        started = time.perf_counter()
        result = write_pack(packs, "probe.safetensors", items)
        written = time.perf_counter() - started
        pack = packs / "probe.safetensors"
        wanted = [(place, memoryview(bytearray(place.nbytes))) for place in result.blobs]

        def read(cold: bool) -> float:
            if cold:
                drop_cache(pack)
            return read_blobs(packs, list(wanted)).seconds

        cold = min(read(True) for _ in range(ROUNDS))
        cached = min(read(False) for _ in range(ROUNDS))
    what = f"{PROBE_NBYTES >> 20} MiB through thaw's own path, hashed"
    return [
        _rate("write", written, f"commit: {what}, fsync included"),
        _rate("read-cold", cold, f"hydrate from a cold disk: {what}, best of {ROUNDS}"),
        _rate("read-cached", cached, f"hydrate from the page cache: {what}, best of {ROUNDS}"),
    ]


def _item(i: int, block: bytes) -> PackItem:
    def read() -> bytes:
        return i.to_bytes(4, "little") + block

    return PackItem(name_prefix="", dtype="U8", shape=(ITEM_NBYTES,), nbytes=ITEM_NBYTES, read=read)


def _rate(name: str, seconds: float, text: str) -> Figure:
    return Figure(name=name, value=PROBE_NBYTES / MIB / seconds, unit="MiB/s", basis="measured", text=text)


def of_model(model: ModelReport, rates: list[Figure], engine: Engine | None) -> list[Figure]:
    """Seconds to load and to prefill a session of `model.session_tokens` tokens, as far as that can be said."""
    out = []
    if model.session_nbytes is not None:
        for rate in rates:
            if rate.name.startswith("read-"):
                seconds = model.session_nbytes / MIB / rate.value
                text = f"{model.session_tokens} tokens at the measured rate of {rate.name}"
                out.append(_seconds(f"load-{rate.name[5:]}", seconds, text))
    prefill = _by_engine(model, engine) if engine is not None else _by_matmul(model)
    out += [prefill] if prefill is not None else []
    load = next((figure for figure in out if figure.name == "load-cached"), None)
    if prefill is not None and load is not None:
        text = f"prefill of {model.session_tokens} tokens over loading them from the page cache"
        ratio = prefill.value / load.value
        out.append(Figure(name="load-against-prefill", value=ratio, unit="×", basis="estimated", text=text))
    return out


def _by_engine(model: ModelReport, engine: Engine) -> Figure:
    """Prefill a short prompt in the loaded engine and scale it (attention grows faster, so this is a lower bound)."""
    count = min(PROBE_TOKENS, engine.info.max_model_len // 2)
    tokens = [1 + i % (engine.info.vocab_size - 1) for i in range(count)]
    session = engine.open()
    try:
        started = time.perf_counter()
        engine.append(session, tokens).result()
        seconds = time.perf_counter() - started
    finally:
        engine.close_session(session)
    text = f"scaled from a measured prefill of {count} tokens in the loaded engine"
    return _seconds("prefill", seconds * model.session_tokens / count, text)


def _by_matmul(model: ModelReport) -> Figure | None:
    """From the multiplication rate of torch on this CPU and the config's number of parameters."""
    if model.prefill_flops is None or importlib.util.find_spec("torch") is None:
        return None
    flops: Callable[[str], float] = importlib.import_module("thaw.engines.transformers.stock").flops_per_s
    rate = flops(model.dtype)
    text = f"from the config and a measured {rate / 1e9:.0f} GFLOP/s of {model.dtype} matrix multiplication on this CPU"
    return _seconds("prefill", model.prefill_flops / rate, text)


def _seconds(name: str, value: float, text: str) -> Figure:
    return Figure(name=name, value=value, unit="s", basis="estimated", text=text)
