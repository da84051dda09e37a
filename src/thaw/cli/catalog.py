"""Which verbs there are, in the order in which people meet them.

`thaw --help` is written from this table alone, so that it loads no verb. A test checks each line against its command.
"""

from __future__ import annotations

SECTIONS: dict[str, dict[str, str]] = {
    "Start and continue": {
        "init": "Create a repository here.",
        "run": "Continue a branch: read a prompt, generate, commit.",
        "fork": "Fork a point into several children, one branch each.",
        "adopt": "Move a branch to the winner.",
    },
    "Inspect": {
        "log": "List the commits of a branch, or draw the whole tree.",
        "show": "Show a commit: its state, turns, origin and bytes.",
        "diff": "Show where two points diverge, in tokens, text and bytes.",
        "rebase": "Replay a point under other weights and show the drift, token by token.",
        "match": "Find the longest stored prefix of a text.",
        "stats": "Show bytes per branch and what sharing saves.",
    },
    "Branches and tags": {
        "branch": "List, create, rename or delete branches.",
        "tag": "List, create or delete tags.",
        "reflog": "List where a branch pointed, move by move.",
        "undo": "Undo the last move of a branch.",
    },
    "Remotes": {
        "clone": "Create a repository from a remote.",
        "push": "Send branches to a remote, with what it lacks of their history.",
        "fetch": "Fetch a remote's branches; origin/main is then a point.",
        "pull": "Fetch a branch and move the local one forward.",
        "forget": "Delete branches of a remote with all that they alone reach.",
        "remote": "Add, list and remove remotes; delete what one no longer needs.",
    },
    "Weights": {
        "weights": "Store a model's weights in the repository, and run it from there.",
    },
    "Verify and clean up": {
        "verify": "Hydrate in a fresh process and report which laws held.",
        "fsck": "Check every stored byte; rebuild a lost database.",
        "gc": "Delete data that nothing refers to.",
        "receipt": "Check receipts: records of measurements.",
    },
    "Engines": {
        "pool": "Run branches in a pool of engines; list pools.",
        "serve": "Serve OpenAI's and Anthropic's APIs; every response can be forked.",
        "up": "Start an engine server for the other verbs to use.",
        "down": "Stop the server that `thaw up` started.",
        "engine": "Configure a stock engine for thaw; inspect a running one.",
    },
    "This machine": {
        "doctor": "Report what works here, for a model or just its config.",
        "demo": "Watch a model read once and continue four times in a fresh process.",
        "bench": "Measure thaw against the same work without it.",
    },
}
VERBS: dict[str, str] = {name: text for verbs in SECTIONS.values() for name, text in verbs.items()}
LIGHT = ("log", "show", "diff", "stats", "branch", "tag", "reflog")
"""Those that only read the repository, declared without click (`light`)."""
