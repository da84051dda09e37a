"""In every worker of vLLM: KV between its blocks, the host cache and packs."""
