"""Answers from a model: streamed, in batches, in a terminal and on a page.

`token_generator` makes token ids from token ids, `generator` text from text. `terminal` answers once or in a chat,
`page` serves a web page.
"""
