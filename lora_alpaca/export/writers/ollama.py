"""Ollama's Modelfile, beside a GGUF file: the prompt that the model was trained with, and what ends an answer."""

from lora_alpaca.errors import TemplateError
from lora_alpaca.export.tensors import ModelFacts
from lora_alpaca.prompts import ChatTemplate
from lora_alpaca.prompts.go_template import go_template

MODELFILE = "Modelfile"
LONGEST = 8192  # tokens of context that Ollama is told to make room for, at most
_ONE_TURN = "# The model was trained on single questions: the last message is asked, earlier ones are left out.\n"
_TYPED = "# Ollama reads control tokens that a user types as such.\n"


def modelfile(facts: ModelFacts, gguf_name: str) -> tuple[str, list[str]]:
    """Return the Modelfile of a GGUF file beside it, and notes on what it cannot say."""
    template, notes = facts.template, list[str]()
    try:
        written = f'{_TYPED}TEMPLATE """{go_template(template, facts.tokenizer.eos_token or "")}"""\n'
    except TemplateError as error:
        notes.append(f"warning: Modelfile: it has no TEMPLATE ({error}); Ollama takes the one that it knows, if any")
        written = "# No TEMPLATE: Ollama takes the one that it knows by the chat template in the GGUF file, if any.\n"
    else:
        if not isinstance(template, ChatTemplate) and not template.turn:
            written = _ONE_TURN + written
    longest = min(facts.base.max_length or LONGEST, LONGEST)
    stops = [facts.tokenizer.decode([number]).strip() for number in facts.stop_ids]
    parameters = [f'PARAMETER stop "{stop}"' for stop in stops if stop and '"' not in stop]
    return "\n".join([f"FROM ./{gguf_name}", written, *parameters, f"PARAMETER num_ctx {longest}", ""]), notes
