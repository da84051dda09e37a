"""Values are read on many threads, the first of a kind, too: msgspec works a type out when it is first used, and
crashes where two threads do so at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"
PROGRAM = '''
import sys, threading, types
from typing import Annotated
import msgspec
from thaw.core import canonical

KINDS = """
from __future__ import annotations
class Leaf(msgspec.Struct, frozen=True, array_like=True):
    id: Annotated[str, msgspec.Meta(pattern="^a")]
    at: Annotated[int, msgspec.Meta(ge=0)]
class Part(msgspec.Struct, frozen=True, kw_only=True):
    leaves: tuple[Leaf, ...]
class Top(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="t/1"):
    parts: tuple[Part, ...]
    name: str | None
"""
DATA = b'{"name":null,"parts":[{"leaves":[["a",1]]}],"type":"t/1"}'
sys.setswitchinterval(1e-6)

def read(kind, barrier, seen):
    barrier.wait()
    seen.append(canonical.decode(DATA, kind))

for number in range(60):
    module = sys.modules[f"m{number}"] = types.ModuleType(f"m{number}")
    module.__dict__.update(msgspec=msgspec, Annotated=Annotated)
    exec(KINDS, module.__dict__)
    barrier, seen = threading.Barrier(4), []
    threads = [threading.Thread(target=read, args=(module.Top, barrier, seen)) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(seen) == 4 and seen[0].parts[0].leaves[0].at == 1, number
'''


def test_the_first_values_of_a_kind_are_read_by_several_threads_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={"PYTHONPATH": str(SOURCE)}, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
