"""Hugging Face model folders: tokenizer, config and weights, read the same way by every engine. No engine in it.

What the engines share of a model's identity is here, so that two engines with the same folder and dtype agree on it.
"""
