"""Bytes to raw rows, strictly: `text` decodes and counts lines, `json_rows` reads JSON, `files` every kind of file."""
