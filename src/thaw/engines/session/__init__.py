"""What was said in a session, of any engine: turns, their text, banned words. No engine and no KV here."""
