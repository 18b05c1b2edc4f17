"""A run made again from its record: `reproducing` is the verb, `repetition` how such a run starts.

`comparison` says how the two runs compare, tensor by tensor and loss by loss.
"""
