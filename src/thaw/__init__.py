"""thaw: git for a running LLM. Snapshot a live inference session, bring it back as N children, prefill nothing twice.

    import thaw
    engine = thaw.load_engine("transformers", model="path/to/model")
    repo = thaw.open("runs", engine=engine)
    s = repo.session()
    s.append("a long document …")
    s.commit("read it", branch="main")
    kids = s.fork(4)
    outs = kids.generate(["Why?", "How?", "Who?", "When?"], thaw.Sampling(max_tokens=64))

Names load on first use: importing thaw loads no torch, no engine and no web framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from thaw._version import __version__

if TYPE_CHECKING:
    from thaw import aio, snapshot
    from thaw.core.errors import ThawError
    from thaw.core.proof import Proof
    from thaw.core.sampling import Sampling
    from thaw.engines import load_engine
    from thaw.engines.joining import attach
    from thaw.pool import ForkPool
    from thaw.repo import Group, Repository, Session, clone, init, open

_HOME = {
    "aio": "thaw.aio",
    "attach": "thaw.engines.joining",
    "ThawError": "thaw.core.errors",
    "ForkPool": "thaw.pool",
    "Proof": "thaw.core.proof",
    "Sampling": "thaw.core.sampling",
    "load_engine": "thaw.engines",
    "Group": "thaw.repo",
    "Repository": "thaw.repo",
    "Session": "thaw.repo",
    "clone": "thaw.repo",
    "init": "thaw.repo",
    "open": "thaw.repo",
    "snapshot": "thaw.snapshot",
}
_MODULES = ("aio", "snapshot")
__all__ = [
    "ForkPool",
    "Group",
    "Proof",
    "Repository",
    "Sampling",
    "Session",
    "ThawError",
    "__version__",
    "aio",
    "attach",
    "clone",
    "init",
    "load_engine",
    "open",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'thaw' has no attribute {name!r}")
    module = importlib.import_module(home)
    return module if name in _MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
