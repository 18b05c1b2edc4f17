"""Prompts of our own that a served model is asked: what has gone wrong before, and nothing of anybody's data."""

from lora_alpaca.prompts import Conversation, Message

_SYSTEM, _USER, _ANSWER = "system", "user", "assistant"
_ARTICLE = (
    "The alpaca is a domesticated animal of South America. It is smaller than the llama, and is kept for its fleece, "
    "which is spun and woven into blankets, sweaters and hats. Herds graze at 3500 to 5000 metres above the sea, on "
    "the meadows of Peru, Bolivia, Ecuador and Chile. Unlike llamas, alpacas were not bred to carry loads."
)
PROBES = {  # by name; the first ones are the most telling
    "one instruction": Conversation.of("Tell me about alpacas."),
    "a sum": Conversation.of("Add the numbers.", "2 + 3"),
    "a short answer": Conversation.of("Answer with one word: what colour is the sky on a clear day?"),
    "several turns": Conversation(
        (Message(_USER, "What is 2 + 3?"), Message(_ANSWER, "5"), Message(_USER, "And 4 more?"))
    ),
    "a system message": Conversation((Message(_SYSTEM, "You are brief."), Message(_USER, "What is a llama?"))),
    "many scripts": Conversation.of("Übersetze ins Englische: ¿Qué tal? 你好, שלום, 🦙"),
    "with an input": Conversation.of("Name the capital of the country.", "Country: Peru"),
    "a long answer": Conversation.of("Write a long story of a journey over the Andes, with every detail."),
    "several lines": Conversation.of("Sort the list.\n\n- pear\n- apple\n- fig"),
    "code": Conversation.of("What does this function return?", "def f(x):\n    return 2 * x  # double"),
    "a long input": Conversation.of("Summarise the text in one sentence.", _ARTICLE),
}
