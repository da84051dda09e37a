"""Pure values and laws: ids, objects, identity, sampling, points, proofs, errors.

Nothing here touches a file, a device, a thread or a clock; everything here can be imported in a few
milliseconds and used inside an engine's worker.
"""
