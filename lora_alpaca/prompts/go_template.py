"""A prompt template as a template of Go, which Ollama's Modelfile holds: the same prompt, for messages.

Go's templates cannot search a text. Where a prompt with a second text begins otherwise (see `jinja` on how one message
holds both), a template that calls itself looks at each place of the message in turn.
"""

from collections.abc import Sequence

from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts.chat import ChatTemplate, Part, Slot
from lora_alpaca.prompts.conversation import EOS
from lora_alpaca.prompts.jinja import around, in_one, two_texts
from lora_alpaca.prompts.loading import AnyTemplate
from lora_alpaca.prompts.template import Template, pieces

_CONTENT = "{{ $m.Content }}"
_FOLLOWED = "gt (len (slice $.Messages $i)) 1"  # whether a message is not the last one
_ROLES = ("user", "assistant", "user", "assistant", "user")


def go_template(template: AnyTemplate, end: str) -> str:
    """Return the template of Go; `end` is the tokenizer's end token.

    Raises TemplateError for a chat template that does not write every turn alike.
    """
    return _of_chat(template) if isinstance(template, ChatTemplate) else _of_text(template, end)


def _of_text(template: Template, end: str) -> str:
    def form(text: str, **values: str) -> str:
        written = {"placeholder": values, "control": {EOS: literal(end)}}
        return "".join(
            written.get(kind, {}).get(piece) or literal(piece) for kind, piece in pieces(text, template.control)
        )

    two = two_texts(template)
    define, first = "", form(template.prompt_no_input, instruction=_CONTENT)
    if two and in_one(template, two) and two != around(template, two):
        alone = around(template, two)
        define = _either("before", two.between, two.before, alone.before)
        first = '{{ template "before" $m.Content }}' + _CONTENT + literal(alone.behind)
        if two.behind != alone.behind:
            define += _either("behind", two.between, two.behind, alone.behind)
            first = '{{ template "before" $m.Content }}' + _CONTENT + '{{ template "behind" $m.Content }}'
    system = ""
    if template.system:
        default = form(template.system, system=literal(template.default_system)) if template.default_system else ""
        system = (
            f"{{{{ if .System }}}}{form(template.system, system='{{ .System }}')}{{{{ else }}}}{default}{{{{ end }}}}"
        )
    answer = form(template.answer, output=_CONTENT)
    if template.turn:
        user = form(template.turn, instruction=_CONTENT)
        if user != first:
            system += "{{ $first := true }}"
            user = f"{{{{ if $first }}}}{first}{{{{ $first = false }}}}{{{{ else }}}}{user}{{{{ end }}}}"
        answer += f"{{{{ if {_FOLLOWED} }}}}{form(template.end)}{{{{ end }}}}"
    else:  # the last question is the only one
        user = f"{{{{ if lt (len (slice $.Messages $i)) 3 }}}}{first}{{{{ end }}}}"
        answer = f"{{{{ if not ({_FOLLOWED}) }}}}{answer}{{{{ end }}}}"
    return _whole(define + system, user, answer)


def _either(name: str, sought: str, found: str, otherwise: str) -> str:
    """Return the definition of a template that writes one of two texts, as a text is in its argument or not."""
    size = len(sought.encode())  # Go counts bytes
    return (
        f'{{{{ define "{name}" }}}}{{{{ if lt (len .) {size} }}}}{literal(otherwise)}'
        f"{{{{ else if eq (slice . 0 {size}) {_quoted(sought)} }}}}{literal(found)}"
        f'{{{{ else }}}}{{{{ template "{name}" (slice . 1) }}}}{{{{ end }}}}{{{{ end }}}}'
    )


def _of_chat(template: ChatTemplate) -> str:
    """Return the template of a chat template that writes every turn alike, as its renderings of stand-ins show."""
    start, *between = _texts(template.shape(_ROLES))
    with_system = _texts(template.shape(("system", *_ROLES)))
    to_answer, to_question = between[0], between[1]
    if between != [to_answer, to_question] * 2 + [to_answer] or with_system[2:] != between:
        raise TemplateError("the chat template writes some turns otherwise than others")
    system = f"{{{{ if .System }}}}{literal(with_system[0])}{{{{ .System }}}}{literal(with_system[1])}"
    user = f"{_CONTENT}{literal(to_answer)}"
    answer = f"{_CONTENT}{{{{ if {_FOLLOWED} }}}}{literal(to_question)}{{{{ end }}}}"
    return _whole(f"{system}{{{{ else }}}}{literal(start)}{{{{ end }}}}", user, answer)


def _texts(parts: Sequence[Part]) -> list[str]:
    """Return the texts before, between and behind the messages of a rendered conversation."""
    texts = [""]
    for part in parts:
        if isinstance(part.what, Slot):
            texts.append("")
        else:
            texts[-1] += part.what
    return texts


def _whole(system: str, user: str, answer: str) -> str:
    return (
        f"{system}{{{{ range $i, $m := .Messages }}}}"
        f'{{{{ if eq $m.Role "user" }}}}{user}'
        f'{{{{ else if eq $m.Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
    )


def literal(text: str) -> str:
    """Return a text as it stands in a template of Go, within a Modelfile, whose reader drops what is not printed."""
    plain = all(letter.isprintable() or letter in "\n\t" for letter in text)
    return text if plain and "{{" not in text and '"""' not in text else f"{{{{ {_quoted(text)} }}}}"


def _quoted(text: str) -> str:
    """Return a text as a string of Go."""
    escapes = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\t": r"\t"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'
