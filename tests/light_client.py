"""A client of a served engine in a fresh process: what joining it costs, and which packages it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import json, resource, sys
import thaw

def cpu():
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])

url, key, folder = sys.argv[1:]
with thaw.attach(url, api_key=key) as engine, thaw.open(folder, engine=engine) as repo:
    joined = cpu()
    session = repo.session(seed=1)
    said = session.chat([{"role": "user", "content": "Hi"}], thaw.Sampling(max_tokens=4)).text
    session.commit("said", branch="main")
    restored = repo.session("main").generate("More", thaw.Sampling(max_tokens=4)).num_cached_tokens
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"joined_s": joined, "cpu_s": cpu(), "loaded": loaded, "restored": restored}))
"""
HEAVY = {"torch", "transformers", "vllm", "sglang"}


def light_client(url: str, key: str, folder: Path) -> dict[str, Any]:
    """CPU seconds until it had joined (`joined_s`) and in all (`cpu_s`), the packages `loaded`, and the tokens
    `restored` from its own commit."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, url, key, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
