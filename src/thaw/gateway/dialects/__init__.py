"""What each API's requests, replies and events look like: one file an endpoint, two for what a family shares."""
