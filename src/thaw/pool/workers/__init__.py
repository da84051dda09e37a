"""The workers of a pool: `worker` is one, `fleet` boots, restarts and drains them, `reaper` closes their sessions."""
