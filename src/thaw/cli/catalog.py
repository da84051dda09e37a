"""Which verbs there are, in the order in which people meet them.

`thaw --help` is written from this table alone, so that it loads no verb. A test checks each line against its command.
"""

from __future__ import annotations

SECTIONS: dict[str, dict[str, str]] = {
    "Begin and go on": {
        "init": "Make a repository here.",
        "run": "Go on with a branch: read a prompt, generate, commit.",
        "fork": "Go on from a point as several children in one batch, a branch each.",
        "adopt": "Make the winner the branch.",
    },
    "Look": {
        "log": "List the commits of a branch, or draw the whole tree.",
        "show": "Show a commit: its state, turns, origin and bytes.",
        "diff": "Show where two points part, in tokens, text and bytes.",
        "match": "Find the longest stored prefix of a text.",
        "stats": "Show bytes by branch and what sharing saves.",
    },
    "Names": {
        "branch": "List, make, rename or delete branches.",
        "tag": "List, make or delete tags.",
        "reflog": "List where a branch stood, move by move.",
        "undo": "Take back the last move of a branch.",
    },
    "Trust": {
        "verify": "Hydrate in a fresh process and say which laws held.",
        "fsck": "Check every stored byte; rebuild a lost database.",
        "gc": "Delete what nothing refers to any more.",
        "receipt": "Check measured records.",
    },
    "Engines": {
        "pool": "Run a round of branches in a pool of engines; list pools.",
        "serve": "Serve OpenAI's and Anthropic's APIs; every response can be forked.",
        "up": "Start an engine as a server that the verbs join.",
        "down": "End the engine that `thaw up` started.",
        "engine": "Write what a stock engine needs to load thaw.",
    },
    "This machine": {
        "doctor": "Say what works here, for a model or its config alone.",
        "demo": "Watch a model read once and go on four times in a fresh process.",
        "bench": "Measure thaw against doing without it.",
    },
}
VERBS: dict[str, str] = {name: text for verbs in SECTIONS.values() for name, text in verbs.items()}
LIGHT = ("log", "show", "diff", "stats", "branch", "tag", "reflog")
"""Those that only read the repository, declared without click (`light`)."""
