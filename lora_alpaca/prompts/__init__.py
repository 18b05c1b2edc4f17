"""One template for training and generation: a conversation becomes fragments of text and control tokens.

    Conversation.of("Tell me about alpacas.", output="Alpacas hum.")
        -> [Fragment("Below is ... ### Response:\\n", learned=False), Fragment("Alpacas hum.", learned=True), END]

Generation is fed exactly the fragments that come before the answer, so the two cannot drift apart.
`conversation` has the types, `template` templates of text, `chat` the tokenizer's own: `rendering` renders it,
`escaping` keeps control tokens that were typed out of that, `time_limit` stops an endless one. `loading` finds
templates.
"""

from lora_alpaca.prompts.chat import ChatTemplate
from lora_alpaca.prompts.conversation import EOS, Conversation, Fragment, Message
from lora_alpaca.prompts.loading import (
    AnyTemplate,
    fitting_template,
    load_template,
    template_folder,
    template_from_json,
    template_names,
)
from lora_alpaca.prompts.template import Template

__all__ = [
    "EOS",
    "AnyTemplate",
    "ChatTemplate",
    "Conversation",
    "Fragment",
    "Message",
    "Template",
    "fitting_template",
    "load_template",
    "template_folder",
    "template_from_json",
    "template_names",
]
