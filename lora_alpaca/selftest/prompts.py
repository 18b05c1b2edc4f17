"""Checks of tokens: what of a row is learned, where answers end, and whether all who prompt a model do it alike."""

from collections.abc import Sequence

import transformers

from lora_alpaca.data.examples import Example
from lora_alpaca.engine.packing import pack
from lora_alpaca.prompts import Conversation
from lora_alpaca.selftest.bench import Bench
from lora_alpaca.selftest.finding import Finding

SEAMS = (  # where prompts have come apart: white space at their ends, scripts, several lines
    Conversation.of(" Begin with a space.", "", "Yes."),
    Conversation.of("End with a newline.\n", "", "Yes."),
    Conversation.of("Greet in Chinese: 你好 🦙", "", "你好!"),
    Conversation.of("Sort the lines.", "b\n\na", "a\nb"),
)


def labels(bench: Bench) -> Finding:
    """The learned tokens of every row, as text, against the answer in its file."""
    pairs = zip(bench.conversations, bench.examples, strict=True)
    return _counted(
        [
            f"of {row.question.text!r}, {text!r} is learned"
            for row, example in pairs
            if (text := _learned_text(bench, example)) != row.answers[0].strip()
        ]
    )


def end_token(bench: Bench) -> Finding:
    """The last token of every row: learned, fed to the loss, and one that ends answers in generation."""
    ends, found = set(bench.codec.stop_ids), list[str]()
    for row, example in zip(bench.conversations, bench.examples, strict=True):
        fed = pack([example]).labels.tolist()
        if not example.spans or example.spans[-1][1] != len(example.ids) or fed[-1:] != [int(example.ids[-1])]:
            found.append(f"of {row.question.text!r}, the last token is not learned")
        elif int(example.ids[-1]) not in ends:
            found.append(f"of {row.question.text!r}, the last token does not end an answer")
    return _counted(found)


def template(bench: Bench) -> Finding:
    """The prompt of every row: the tokens before the answer in training, those of generation, those of a server."""
    served = transformers.AutoTokenizer.from_pretrained(bench.merged)
    found = []
    for row in [*bench.conversations, *SEAMS]:
        (example,) = bench.encoder.encode([row])
        trained = example.ids[: example.spans[0][0]].tolist()
        others = {
            "generation": bench.codec.prompt_ids(row.prompt),
            "the exported chat template": served.apply_chat_template(
                [{"role": "user", "content": _content(row)}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            ),
        }
        found += [f"{who} begins {row.question.text!r} otherwise" for who, ids in others.items() if ids != trained]
    return _counted(found)


def _content(row: Conversation) -> str:
    """Return an instruction and its input as the one text that Alpaca's exported chat template takes."""
    question = row.question
    return f"{question.text}\n\n### Input:\n{question.input}" if question.input else question.text


def _learned_text(bench: Bench, example: Example) -> str:
    """Return the learned tokens of a row as text, without the end token, and without white space around it."""
    ids = [token for first, last in example.spans for token in example.ids[first:last].tolist()]
    return str(bench.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _counted(wrong: Sequence[str]) -> Finding:
    return Finding(len(wrong), 0, next(iter(wrong), ""))
