"""Memory of the client on the restore path: how far the peak grows beyond the KV itself while a session is loaded.

Linux only: the peak (`VmHWM`) is reset through /proc/self/clear_refs before each load. Sessions stay open until the
end, so that no load reuses the memory of one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from thaw.bench.sample import Sample
from thaw.core import cache
from thaw.core.errors import Unsupported
from thaw.repo import Repository

WARM_UP_TOKENS = 256


def is_measurable() -> bool:
    return Path("/proc/self/clear_refs").exists()


def measure(repo: Repository, commit: str, lengths: Sequence[int]) -> Sample:
    """Load the first `lengths[0]`, then the first `lengths[1]` tokens. `peak_…`: growth of the peak; `extra_…`: that
    less the KV."""
    values: dict[str, float] = {}
    kv_token_nbytes = cache.token_nbytes(repo.engine.info.groups)
    with ExitStack() as open_sessions:
        open_sessions.enter_context(repo.session(repo.at(commit, token=WARM_UP_TOKENS + 1)))
        for name, length in zip(("short", "long"), lengths, strict=True):
            _reset_peak()
            before = _status("VmRSS")
            session = open_sessions.enter_context(repo.session(repo.at(commit, token=length + 1)))
            grown, kv = _status("VmHWM") - before, session.num_kv * kv_token_nbytes
            values |= {f"peak_{name}_nbytes": grown, f"kv_{name}_nbytes": kv, f"extra_{name}_nbytes": grown - kv}
    return Sample(values=values)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Unsupported(f"this system does not let a process reset its peak memory ({error})") from None


def _status(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise Unsupported(f"this system does not say {field} of a process")
