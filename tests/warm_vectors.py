"""Imported by the fork server (`warm.py`): what torch's compiler finds out about this CPU's vectors is found out once.

vLLM compiles one small function, the ranks of log probabilities, also where it runs eagerly. Before a process compiles
anything, torch has another Python try a library, which takes most of an engine's first answer. What it finds is kept in
a cache of the process, and forks inherit it.
"""

from torch._inductor.cpu_vec_isa import pick_vec_isa

pick_vec_isa()
