"""The processes of a run: how they meet (`rendezvous`), which of them is alive (`heartbeat`), and what they compute
together (`world`).
"""
