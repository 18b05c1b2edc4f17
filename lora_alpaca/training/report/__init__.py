"""The report of a run: report.html and report.md in its output folder, drawn anew while it runs.

`run_report` is called by the loop, and measures and writes; `rows` says what rows cost before and after, `answers` what
is answered; `content` turns the facts into blocks of a `document`, with `plots`. `redrawing` and `comparing` are the
commands that read the facts of runs again.
"""
