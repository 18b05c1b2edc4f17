"""What a run will take, before it: `estimating` is the verb, `probe` measures a few layers of the model here.

`measuring` is the process that a probe starts, `counting` finds how many tokens the rows have, `table` prints.
"""
