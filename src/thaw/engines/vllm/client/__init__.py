"""The client's side: thaw's engine contract over the requests of a vLLM that runs elsewhere."""
