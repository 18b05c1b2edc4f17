"""OpenAI's API over a `Generator`: `generate --serve`.

A request goes through `guard` (names, key, sizes), `bodies` (what may be asked, and how), `admission` (the queue),
`chat` or `completions` (prompt in, choices out), and `replies` (one JSON object, or a stream of events). `listening` is
the socket and the thread that serves it, `serving` the command.
"""
