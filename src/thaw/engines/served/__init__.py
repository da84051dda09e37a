"""What engines that serve requests from processes of their own have in common (vLLM, SGLang).

The client, the mail between it and the engine, the arena of sessions' KV, the packs it comes from and goes to. No
engine's package is imported here.
"""
