"""The gateway: an OpenAI and Anthropic door to a repository, where every response is a point that can be forked.

    dialects    what each API's requests, replies and events look like; nothing else knows them
    service     the neutral middle: tenants, live sessions, jobs, the ledger
    app         routes, and what is refused before a body is read

A request becomes an `Asked` (messages or tokens, sampling, where to go on from), a `ReplyJob` runs it and commits, and
the dialect renders its deltas and its `RequestOutcome`. Handlers are thin; the web framework is imported in this
package alone.
"""
