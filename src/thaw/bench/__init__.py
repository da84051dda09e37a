"""Measuring: what thaw claims in numbers, as receipts.

`fork` measures forks and hydrates against prefilling again, `vllm` thaw in vLLM against vLLM alone, `plot` draws the
former's receipt, `startup` (a program) says what a command costs. Otherwise nothing here prints, and nothing here is
imported by what it measures.
"""
