"""The stages of gpu.py, one a process and one a module, each with a function `run`.

A stage prints all that it has found so far, as a line of JSON, whenever it has found more. Models are random and made
on the device: no weights are fetched, and none come from the disk but those of the demo. `stage` is where a stage
computes, `models` what it trains, `steps` what the two stages of a step share, `rank` one of the `two_processes`.
"""
