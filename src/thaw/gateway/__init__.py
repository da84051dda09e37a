"""The gateway: OpenAI's and Anthropic's APIs over a repository, where every response is a point that can be forked.

    dialects    what each API's requests, replies and events look like; nothing else knows them
    service     the neutral middle: tenants, live sessions, jobs, the ledger
    app         routes, and what is refused before a body is read

A request becomes an `Asked` (messages or tokens, sampling, the point), a `ReplyJob` runs it and commits, and
the dialect renders its deltas and its `RequestOutcome`. Handlers are thin; the web framework is imported in this
package alone.
"""
