"""The settings that all tabs share: who answers, the system message, and how tokens are chosen."""

import re
from typing import Any, NamedTuple

import gradio as gr

from lora_alpaca.config import GenerateConfig
from lora_alpaca.errors import ConfigError, TemplateError, visible
from lora_alpaca.inference.codec import Codec
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.page.views import as_html, line
from lora_alpaca.prompts import Conversation, Message

NUMBERS: dict[str, tuple[str, float, str]] = {  # field of Sampling: label, step of the arrows, what it does
    "temperature": ("Temperature", 0.05, "0 is always the likeliest"),
    "top_p": ("Top p", 0.05, "Draw from this share"),
    "top_k": ("Top k", 1, "Draw from so many; 0 is all"),
    "min_p": ("Min p", 0.01, "Of the likeliest, at least"),
    "repetition_penalty": ("Repetition penalty", 0.05, "1 is none"),
    "num_beams": ("Beams", 1, "Above 1: shown whole"),
    "max_new_tokens": ("Max new tokens", 1, "Cut off there"),
}


class Asked(NamedTuple):
    """The settings of one question: the adapter's name, the system message, and fields of Sampling."""

    adapter: str
    system: str
    sampling: dict[str, Any]
    stream: bool

    @property
    def is_shown_whole(self) -> bool:
        """Return whether the answer is shown only when it is complete."""
        return not self.stream or self.sampling["num_beams"] > 1

    def conversation(self, *messages: Message) -> Conversation:
        """Return messages as a conversation, after the system message."""
        system = [Message("system", self.system)] if self.system.strip() else []
        return Conversation((*system, *messages))


class Settings:
    """The controls of all tabs. `inputs` are their components, which `read` takes the values of."""

    def __init__(self, generator: Generator, config: GenerateConfig):
        self.generator, self.config = generator, config
        self.codecs = generator.codecs
        several = len(generator.names) > 1
        choices = [(visible(name), name) for name in generator.names]
        self.adapter = gr.Dropdown(
            choices,
            value=generator.default,
            label="Answers by",
            container=False,
            filterable=False,
            visible=several,
            render=False,
            min_width=180,
            scale=0,
            elem_id="adapter",
        )
        self.inputs: list[Any] = [self.adapter]

    def build(self) -> None:
        """Put the controls on the page, closed."""
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            takes, note = self._system(self.generator.default)
            self.system = gr.Textbox(
                self.config.system, label="System message", info="What the model is told first", lines=2, visible=takes
            )
            self.no_system = line(note, shown=not takes)
            with gr.Row(elem_classes="numbers"):
                numbers = [self._number(name) for name in NUMBERS]
                self.seed = gr.Textbox(  # a number box cannot be empty
                    "" if self.config.seed is None else str(self.config.seed),
                    label="Seed",
                    info="Same seed, same answer",
                    placeholder="random",
                    max_lines=1,
                    min_width=150,
                )
            self.stop = gr.Textbox(
                "\n".join(text.replace("\n", "\\n") for text in self.config.stop or ()),
                label="Stop texts",
                info="One a line; the answer ends before the first that it reaches. \\n is a line break",
                lines=2,
            )
            self.stream = gr.Checkbox(
                True, label="Stream output", info="Off: an answer is shown when it is complete", elem_id="stream"
            )
        self.inputs = [self.adapter, self.system, self.seed, self.stop, self.stream, *numbers]
        if len({self._system(name) for name in self.codecs}) > 1:
            self.adapter.change(
                self._choose_adapter,
                self.adapter,
                [self.system, self.no_system],
                queue=False,
                api_visibility="private",
                show_progress="hidden",
            )

    def read(self, adapter: str, system: str, seed: str, stop: str, stream: bool, *numbers: float | None) -> Asked:
        """Return what the controls say. Raises ConfigError for an empty box; Sampling refuses what is out of range."""
        sampling: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
        for name, value in sampling.items():
            if value is None:
                raise ConfigError(f"{NUMBERS[name][0]} is empty; a number is needed")
        sampling["stop"] = tuple(line.replace("\\n", "\n") for line in stop.split("\n") if line)
        if seed.strip() and not re.fullmatch(r"\d{1,19}", seed.strip()):
            raise ConfigError(f"Seed {seed.strip()!r:.40}: a whole number is needed, or nothing for a random one")
        sampling["seed"] = int(seed) if seed.strip() else None
        takes_system, _ = self._system(adapter)  # else the box is not seen, whatever was left in it
        return Asked(adapter, system if takes_system else "", sampling, stream)

    def _number(self, name: str) -> gr.Number:
        label, step, info = NUMBERS[name]
        return gr.Number(getattr(self.config, name), label=label, info=info, step=step, min_width=150)

    def _system(self, name: str) -> tuple[bool, str]:
        """Return whether an adapter's template has a system message, and a line that says so if not."""
        takes = takes_system(self.codecs[name]) or bool(self.config.system)
        return takes, "" if takes else f"The template {self.codecs[name].template.name} has no system message."

    def _choose_adapter(self, name: str) -> list[Any]:
        takes, note = self._system(name)
        return [gr.Textbox(visible=takes), gr.HTML(as_html(note), visible=not takes)]


def takes_system(codec: Codec) -> bool:
    """Return whether the template of a codec has a place for a system message."""
    try:
        codec.prompt_ids(Conversation((Message("system", "s"), Message("user", "u"))))
    except TemplateError:
        return False
    return True
