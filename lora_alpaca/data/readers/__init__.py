"""Bytes to raw rows, strictly: `sources` finds files, `files` reads them, `text` decodes, `json_rows` reads JSON."""
