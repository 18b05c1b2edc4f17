"""Rows as the bytes of a file, in every form that is read."""

import csv
import io
import json


def as_csv(rows):
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def as_parquet(rows):
    import pyarrow
    import pyarrow.parquet

    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    return table.getvalue()


FORMS = {
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "rows.csv": as_csv,
    "rows.parquet": as_parquet,
}
