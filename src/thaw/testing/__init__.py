"""What others need to test against thaw: small models and the engines' law book. Needs the extra `[testing]`.

May import everything of thaw; nothing of thaw imports it.
"""
