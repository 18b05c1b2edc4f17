"""The disk: after a crash there is the old or the new, whole.

`paths` names files, `json_files` reads those of others within limits, `handles` keeps to real folders, `atomic` writes,
renames and locks, `output_folder` says whose a folder is.
"""
