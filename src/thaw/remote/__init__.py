"""Remotes: where commits lie outside this host, and how they get there and back.

`address` opens a bucket (`obstore`, `folder`), `probe` asks whether it keeps its word. Nothing here loads obstore
before a remote in an object store is opened, and no credential is stored.
"""
