"""The processes of a run: how they meet, which are alive, and what they agree on.

`rendezvous` is how they meet, `heartbeat` which of them is alive and who failed, `world` what they agree on,
`strategy` how a model is spread over them, and `fsdp` the way that shards it.
"""
