"""Parsers of an engine's own, for calls of tools and thoughts: run in a process of that engine's Python.

wire       the messages, one a line
child      the loop of that process; a module with the engine's name is what it runs, and imports the engine
registry   which engines have such a module
process    the gateway's end of it
"""
