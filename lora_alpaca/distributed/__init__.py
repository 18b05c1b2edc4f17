"""The processes of a run.

`rendezvous` is how they meet, `heartbeat` which of them is alive and who failed, `world` what they agree on and
`strategy` how a model is spread over them.
"""
