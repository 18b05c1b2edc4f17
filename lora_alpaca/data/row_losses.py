"""What rows cost a model before and after its training: a parquet table beside a run's report, private as the rows are.

A line for each row: `part` (training or validation), `number` (from 1, as --row has it), `where` (file:row), `tokens`
(those that are learned), and `before` and `after`, in nats per token, null where it was not measured. The schema's
metadata has, under `lora_alpaca`, the run and the options by which its rows are read.
"""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_alpaca.errors import DataError
from lora_alpaca.storage.json_files import Count, Shape, read_plain_file

FILE = "row_losses.parquet"
_KEY = b"lora_alpaca"


class RowLoss(NamedTuple):
    """The losses of a row, and where it is."""

    part: str
    number: int
    where: str
    tokens: int
    before: float | None
    after: float | None

    @property
    def loss(self) -> float | None:
        """Return the loss after training, or before, as long as there is no other."""
        return self.before if self.after is None else self.after

    @property
    def costs(self) -> str:
        """Return the losses in words."""
        losses = ((self.before, "before"), (self.after, "after"))
        return ", ".join(f"loss {loss:.3f} {when}" for loss, when in losses if loss is not None)


class RowLossFacts(Shape):
    """What the metadata says: the run, the step that `after` of the validation rows is of, and the run's options."""

    run: str
    step: Count
    options: dict[str, Any]


def as_parquet(rows: Iterable[RowLoss], facts: Mapping[str, Any]) -> bytes:
    """Return the table as the bytes of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    kinds = {"number": pyarrow.int64(), "tokens": pyarrow.int64(), "before": pyarrow.float64()}
    kinds["after"] = pyarrow.float64()
    columns = dict(zip(RowLoss._fields, zip(*rows, strict=True), strict=False))
    made = {name: pyarrow.array(columns.get(name, ()), kinds.get(name, pyarrow.string())) for name in RowLoss._fields}
    table = pyarrow.table(made).replace_schema_metadata({_KEY: json.dumps(facts).encode()})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def read(path: Path) -> tuple[list[RowLoss], dict[str, Any]]:
    """Return the rows and facts of a table. Raises DataError for a file that is no such table."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.is_symlink():
            raise OSError("a symbolic link")
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(read_plain_file(path)))
        facts = json.loads((table.schema.metadata or {})[_KEY])
        rows = [RowLoss(**row) for row in table.to_pylist()]
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a table of a run's rows"
        raise DataError(f"{path}: {reason}; train the run with --report, or name another folder") from None
    RowLossFacts.require(facts, path, DataError, "the file is damaged; name another folder")
    return rows, facts
