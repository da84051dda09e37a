"""What was said in a session, of any engine: turns, their text, words that may not come. No engine and no KV here."""
