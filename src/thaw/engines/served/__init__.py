"""What engines that serve requests from processes of their own have in common (vLLM, SGLang), by process.

    client/     in the caller's process: the engine contract, over requests
    scheduler/  in the engine's scheduler: what it keeps of sessions; no torch
    worker/     in the engine's workers: sessions' KV in host memory, the packs it comes from and goes to

Here is what several of them need: the protocol, the mailbox between client and engine, budgets. No engine's package is
imported anywhere below.
"""
