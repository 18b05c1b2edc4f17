"""Every automatic choice and estimate, made before the first heavy step.

`estimate` has the formulas in bytes and work, `plan` the choices that follow from them, `preflight` the checks.
"""
