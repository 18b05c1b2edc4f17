"""Answers from a model: `token_generator` makes token ids from token ids, and `generator` text from text.

`terminal` answers once or in a chat, `web_page` serves a page with every sampling control.
"""
