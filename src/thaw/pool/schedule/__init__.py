"""Scheduling: which chunk of a round runs next, in which worker, and how its point gets there.

resolver       what a caller gives as a point -> a `ForkPoint`
fork_point     the point of a round
job            a branch until it has its result, and the chunk of jobs that run as one batch
scheduler      queues, the choice of a worker, retries
batch          one chunk in one worker
point_loader   the point brought into a worker, or into the arena
planner        fork, hydrate or prefill, by measured rates (`rates`)
monitor        ends what is late, and workers that hang
"""
