"""In vLLM's scheduler, between its steps: what sessions have, and what the workers are to do. No torch here."""
