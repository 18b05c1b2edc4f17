"""What a raw row means: its format recognised by its fields, checked, and made into a conversation.

`kinds` has the five formats, `turns` reads lists of messages, `tools` their calls, `fields` tells what else a row may
hold: what is used, what is harmless, and what carries meaning and is an error unless it is named.
"""

from lora_alpaca.data.formats.fields import Fields
from lora_alpaca.data.formats.kinds import (
    EXPECTED,
    FIELDS,
    FORMATS,
    Format,
    conversation,
    parse_columns,
    recognise,
    renamed,
)
from lora_alpaca.data.formats.values import Rejected, RowError, text

__all__ = [
    "EXPECTED",
    "FIELDS",
    "FORMATS",
    "Fields",
    "Format",
    "Rejected",
    "RowError",
    "conversation",
    "parse_columns",
    "recognise",
    "renamed",
    "text",
]
