"""Rows as the bytes of a file, in every form that is read."""

import csv
import io
import json


def as_csv(rows, separator=","):
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def as_parquet(rows, **options):
    import pyarrow
    import pyarrow.parquet

    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, **options)
    return table.getvalue()


def as_arrow(rows, stream=True, dictionary=False, compression=None):
    import pyarrow
    import pyarrow.ipc

    table = pyarrow.Table.from_pylist(rows)
    if dictionary:
        table = pyarrow.table([column.dictionary_encode() for column in table.columns], table.column_names)
    content = io.BytesIO()
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(content, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return content.getvalue()


FORMS = {
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "rows.csv": as_csv,
    "rows.tsv": lambda rows: as_csv(rows, "\t"),
    "rows.arrow": as_arrow,
    "rows.parquet": as_parquet,
}
