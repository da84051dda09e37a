"""What a pool has in shared memory, one a host: its folders (`dirs`), the arena in them (`shared_store`), and the guard
process that removes them when the client was killed."""
