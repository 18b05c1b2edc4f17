"""Scores of a base and of the adapter on it, on rows that neither was trained on.

`held_out` finds the rows, `losses` what the answers in them cost a model, `scores` compares what it answers itself;
`report` shows all of it on a page. `evaluating` is the story.
"""
