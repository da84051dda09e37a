"""The client's side: thaw's engine contract over requests to an engine that runs elsewhere."""
