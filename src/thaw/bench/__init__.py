"""Measuring: what thaw claims in numbers, as receipts.

`fork` measures forks and hydrates against prefilling again, `vllm` thaw in vLLM against vLLM alone, `plot` draws the
former's receipt, `startup` what a command costs as a process, `doctor` says what works on this machine. Nothing here prints, and nothing here is imported by what it
measures.
"""
