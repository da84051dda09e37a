"""The tree of sessions in a browser: who is logged in, its pages, and what can be done from them."""
