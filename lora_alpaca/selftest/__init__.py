"""Checks that this machine, with its libraries, computes what it should: short runs, held to plain transformers.

`testing` is the command, `checks` the table of what is checked. `bench` makes what checks share: rows, runs, exports;
`judge` is plain transformers and PEFT in fp64. `gradients`, `prompts` and `weights` are the checks, `two_ranks` starts
the processes that two of them need, `surroundings` keeps all that is written in one folder, `table` shows the results.
"""
