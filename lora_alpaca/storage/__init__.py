"""The disk: after a crash there is the old or the new, whole.

`paths` names and reads files, `atomic` writes, renames and locks, `output_folder` says whose a folder is.
"""
