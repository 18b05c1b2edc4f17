"""What the fields of a row or turn mean besides those that its format uses: harmless, meaningful, or unknown.

A harmless field says where a row comes from. A meaningful one says what is to be learned of it, so that ignoring it
would teach something else: an error, unless `--ignore_fields` names it. A name in neither list is told.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lora_alpaca.data.formats.values import RowError, short

_HARMLESS = """
    id _id idx index uid uuid guid row row_id item_id sample_id example_id record_id message_id msg_id parent_id
    conversation_id conv_id chat_id session_id thread_id dialogue_id user_id author_id prompt_id question_id task_id
    source sources source_id origin dataset dataset_name dataset_id data_source subset split url link title name file
    filename path page author creator contributor annotator annotator_id license licence copyright version revision
    model model_name model_id engine generator created created_at create_time updated_at timestamp time date datetime
    lang language locale country region domain subject topic topics tag tags keyword keywords category categories genre
    type kind task task_name task_type skill capability difficulty level num_turns turns turn n_turns num_tokens tokens
    token_count length len n_tokens hash md5 sha256 metadata meta info extra notes note comment comments description
    finish_reason stop_reason usage cost price latency annotations __index_level_0__
"""
HARMLESS = frozenset(_HARMLESS.split())  # say where a row comes from, or how it was made

REASONING = ("reasoning_content", "reasoning", "thinking", "thought")  # where an answer's thought is given
LEARNED = ("weight", "train", "loss")  # of a turn: whether its answer is learned
VERDICTS = ("label", "kto_tag")  # of a row: whether its answer is good
REJECTED = ("rejected", "rejected_response", "rejected_output", "rejected_messages")  # settled where `chosen` is named

_TURN = "it belongs into a turn of messages or conversations"
_MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "objects", "bbox", "media")
_MEANINGFUL = {  # name -> what to know about it
    **dict.fromkeys(("chosen", *REJECTED), "preference pairs are not trained on"),
    **dict.fromkeys(_MEDIA, "only text is trained on"),
    **dict.fromkeys(VERDICTS, "a verdict on the answer is true or false"),
    **dict.fromkeys(LEARNED, _TURN),
    **dict.fromkeys(
        ("loss_weight", "loss_scale", "sample_weight", "mask", "loss_mask", "train_detail"),
        "the weight of a turn is 1 or 0, learned or only seen",
    ),
    **dict.fromkeys((*REASONING, "tool_calls", "function_call", "tool_call_id"), _TURN),
    **dict.fromkeys(
        ("cot", "complex_cot", "chain_of_thought", "thoughts", "rationale"),
        "--columns reasoning_content={name} makes it the thought before the answer",
    ),
    **dict.fromkeys(
        ("context", "contexts", "passage", "document", "documents"), "--columns input={name} puts it into the prompt"
    ),
    **dict.fromkeys(("system_prompt", "system_message"), "--columns system={name} makes it the system message"),
    **dict.fromkeys(("system", "history", "tools"), "rows of this format have none"),
    "functions": "--columns tools={name} makes them the tools that may be called",
    "refusal": "an answer that was refused",
    "prefix": "an answer is learned from its beginning",
}


class Fields:
    """What became of the fields of all rows: `harmless` and `unknown` ones that went unused.

    `asked` are those that `--ignore_fields` names.
    """

    def __init__(self, asked: Iterable[str] = ()):
        self.asked = frozenset(asked)
        self.harmless: set[str] = set()
        self.unknown: set[str] = set()

    def check(self, found: Mapping[str, Any], used: Iterable[str], where: str = "") -> None:
        """Take down the fields of a row, or of the turn `where`, that are not used.

        Raises RowError for one that carries meaning and that nobody asked to leave out.
        """
        for name in found.keys() - {*used} - self.asked:
            if _says_nothing(str(name), found[name]):
                continue
            if advice := _MEANINGFUL.get(str(name).lower()):
                raise RowError(
                    f"{where and where + '.'}{name} is {short(found[name])} and would go unused: "
                    f"{advice.format(name=name)}; --ignore_fields {name} leaves it out"
                )
            told = self.harmless if _is_harmless(str(name).lower()) else self.unknown
            told.add(f"{where.partition('[')[0]}[].{name}" if where else str(name))

    def lines(self) -> list[str]:
        """Return sentences about the fields that went unused."""
        lines = [f"fields that are not used: {', '.join(sorted(self.harmless))}"] if self.harmless else []
        if self.unknown:
            names = ", ".join(sorted(self.unknown))
            lines.append(f"warning: fields that are not used: {names}; --ignore_fields says that this is meant")
        return lines


def _is_harmless(name: str) -> bool:
    return name in HARMLESS or name.startswith("unnamed: ")  # a column without a name, such as the index of pandas


def _says_nothing(name: str, value: Any) -> bool:
    """Return whether a field is as good as absent: empty, or what holds anyway (weight 1, label true)."""
    if value is None or value in ("", [], {}):
        return True
    return name.lower() in (*LEARNED, *VERDICTS) and value in (1, "true", "True")
