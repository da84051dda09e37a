"""thaw for LangGraph (extra `[langgraph]`, docs/langgraph.md).

    ChatThaw     a chat model; each answer carries the point that it ends at, and the next call continues from there
    ThawSaver    a checkpointer in the repository's folder; a point is kept as long as a checkpoint names it
    attempts, pick, best_of_n    nodes: N answers as one batch, and one of them by any judge

What is shared: the repository, and through it the engine. Nothing of LangGraph is stored in thaw's packs, and no KV in
LangGraph's checkpoints: a message names a commit, and a tag of the checkpointer's keeps that commit from gc. Names load
on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from thaw.core.errors import Unsupported

if TYPE_CHECKING:
    from thaw.integrations.langgraph.chat_model import ChatThaw
    from thaw.integrations.langgraph.messages import point_of
    from thaw.integrations.langgraph.nodes import attempts, best_of_n, likeliest, pick
    from thaw.integrations.langgraph.saver import ThawSaver

_HOME = {
    "ChatThaw": "chat_model",
    "ThawSaver": "saver",
    "attempts": "nodes",
    "best_of_n": "nodes",
    "likeliest": "nodes",
    "pick": "nodes",
    "point_of": "messages",
}
__all__ = ["ChatThaw", "ThawSaver", "attempts", "best_of_n", "likeliest", "pick", "point_of"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("langchain_core", "langgraph", "httpx"):
            raise Unsupported(
                f"{name} needs {error.name}, which is not installed: pip install 'thaw-vllm[langgraph]'"
            ) from error
        raise
    return getattr(module, name)
