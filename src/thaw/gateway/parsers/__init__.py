"""Parsers of an engine's own, for calls of tools and thoughts: run in a process of that engine's Python.

wire       the messages, one a line
child      the loop of that process; vllm.py and sglang.py are what it runs, and import the engine
process    the gateway's end of it
"""
