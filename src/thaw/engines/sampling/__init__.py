"""How a token is chosen from logits, by thaw's rules, for every engine: in plain Python, and with torch."""
