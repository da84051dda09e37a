"""An engine in the caller's own process: one driver thread, sessions as paged KV, a backend that runs the model.

`fake` and `transformers` are backends behind the same engine, so what is tested on one holds for the other:
sessions, batches, turns, stops, capture, hydrate, fork and park are here; what a token *is* is the backend's.

    a call ──> EmbeddedEngine ──submit──> Driver (one thread; step boundaries)
                                             ├─ Generation: one batch, one step at a time
                                             └─ between steps: cut, fork, cancel
    capture, hydrate: the cut is taken by the driver, the bytes move on an I/O thread
"""
