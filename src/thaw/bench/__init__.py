"""Measuring: what thaw claims in numbers, as receipts.

`fork` measures forks and hydrates against prefilling again, `plot` draws such a receipt, `doctor` says what works on
this machine. Nothing here prints, and nothing here is imported by what it measures.
"""
