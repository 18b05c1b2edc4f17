"""What an option is: a field with group, unit, meaning, checks and consequences; a config names all its mistakes."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from lora_alpaca.config.environment import world_size
from lora_alpaca.errors import ConfigError

UNKNOWN = "extra_forbidden"  # pydantic's type of the problem
Decides = Literal["result", "shape", "engine", "nothing"]


def option(
    default: Any,
    group: str,
    help: str,
    *,
    unit: str = "",
    auto: str = "",
    decides: Decides = "result",
    same_if: str = "",
    **checks: Any,
) -> Any:
    """Return a pydantic field; `auto` describes a default of None, `checks` are pydantic's own.

    `decides` is what another value changes in a run that is resumed: its result; the shape of its tensors too; the plan
    of its engine too; or nothing. Two values of an option count as the same where the recorded fact `same_if` is equal.
    """
    extra: dict[str, Any] = {"group": group, "unit": unit, "auto": auto, "decides": decides, "same_if": same_if}
    return Field(default, description=help, json_schema_extra=extra, **checks)


def _names(value: Any) -> Any:
    """Return `[q_proj,v_proj]` or `q_proj,v_proj`, as typed on a command line, as a list of names."""
    if not isinstance(value, str):
        return value
    return [name.strip().strip("'\"") for name in value.strip().strip("[]()").split(",") if name.strip()]


def _targets(value: Any) -> Any:
    """Return names and regular expressions, typed with commas between them, as a list.

    A comma within brackets belongs to an expression. A list may itself be in brackets, as Python writes one.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] + text[-1:] in ("[]", "()") and (
        text[1:2] in ("'", '"') or not set("\\*+?|()[]{}^$") & set(text[1:-1])
    ):
        text = text[1:-1]
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [name for part in parts if (name := part.strip().strip("'\""))]


def lower(value: Any) -> Any:
    """Return a text in lower case, so that choices may be typed in any."""
    return value.lower() if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_names), Field(min_length=1)]
Targets = Annotated[list[str], BeforeValidator(_targets), Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Dtype = Annotated[Literal["auto", "bf16", "fp16", "fp32"], BeforeValidator(lower)]
Device = Annotated[Literal["auto", "cuda", "mps", "cpu"], BeforeValidator(lower)]
Engine = Annotated[Literal["auto", "packed", "padded"], BeforeValidator(lower)]
Layers = Annotated[str, BeforeValidator(lower), Field(pattern=r"^(all|top:[1-9]\d{0,3})$")]
LearningRate = Annotated[
    Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "auto" if value == "auto" else "number"),
    BeforeValidator(lower),
]
AutoBool = Annotated[Literal["auto", "true", "false"], BeforeValidator(lambda value: str(value).lower())]


class Options(BaseModel):
    """The base of every config: frozen, no unknown name, and one line for all mistakes at once."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=False, protected_namespaces=(), defer_build=True
    )
    positional: ClassVar[tuple[str, ...]] = ()  # options that are also written without their name, in this order
    wording: ClassVar[dict[str, dict[str, str]]] = {}  # option -> `help` or `auto` of this command, for shared options

    def __init__(self, **options: Any):
        texts = {name for name, field in type(self).model_fields.items() if field.default == ""}
        try:  # a text that is not set is None in many a program, as an option that is not given is
            super().__init__(
                **{name: value for name, value in options.items() if value is not None or name not in texts}
            )
        except ValidationError as error:
            problems = error.errors()
            unknown = [self.unknown(options)] if any(problem["type"] == UNKNOWN for problem in problems) else []
            known = [self._sentence(problem) for problem in problems if problem["type"] != UNKNOWN]
            raise ConfigError("; ".join(unknown + known)) from None

    @classmethod
    def _sentence(cls, problem: Any) -> str:
        """Return one pydantic problem as `--flag: what is wrong`."""
        where, message = problem["loc"], problem["msg"]
        if not where:  # a check over several options, raised below
            return str(problem["ctx"]["error"]) if "ctx" in problem else message
        if problem["type"] == "missing":
            return f"{' '.join(name.upper() for name in cls.positional)} are needed, and --{where[0]} is missing"
        return f"--{where[0]} {problem['input']}: {message[0].lower()}{message[1:]}"

    @classmethod
    def unknown(cls, given: Mapping[str, Any], commands: Mapping[str, type["Options"]] | None = None) -> str:
        """Return a sentence on those of the given options that do not exist: what other trainers' flags are here, and
        for any other which of the `commands` has it, or the nearest one that does exist.
        """
        from lora_alpaca.config import other_trainers  # a table that only mistakes need

        found = other_trainers.translate(given, cls.model_fields, world_size())
        said = [f"flags of other trainers: {'; '.join(found.sentences)}"] if found.sentences else []
        for name in found.unknown:
            having = {command: config for command, config in (commands or {}).items() if name in config.model_fields}
            own = [one for one, config in having.items() if not {*config.__mro__[1:]} & {*having.values()}]
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists them all"
            elsewhere = f"--{name} is a flag of {' and '.join(own)} only"
            said.append(elsewhere if having else f"unknown flag --{name}; {hint}")
        return "; ".join(said)

    @classmethod
    def takes_file(cls) -> bool:
        """Return whether options of this command may be in a file: not where they are written without their names."""
        return not cls.positional

    @classmethod
    def is_switch(cls, name: str) -> bool:
        """Return whether a name is that of an option which is true or false."""
        annotation = cls.model_fields[name].annotation if name in cls.model_fields else str
        return annotation is bool or bool in get_args(annotation)

    @classmethod
    def is_list(cls, name: str) -> bool:
        """Return whether a name is that of an option which has several values."""
        annotation = cls.model_fields[name].annotation if name in cls.model_fields else str
        kinds = [get_args(kind)[0] if hasattr(kind, "__metadata__") else kind for kind in get_args(annotation)]
        return any(get_origin(kind) is list for kind in (annotation, *kinds))

    def is_set(self, name: str) -> bool:
        """Return whether the user gave this option, rather than leaving it at its default."""
        return name in self.model_fields_set

    @classmethod
    def deciding(cls, *kinds: Decides) -> set[str]:
        """Return the names of the options that decide one of these kinds of things."""
        return {name for name, extra in cls._extras() if extra["decides"] in kinds}

    @classmethod
    def same_if(cls) -> dict[str, str]:
        """Return option -> the recorded fact that identifies what the option names."""
        return {name: extra["same_if"] for name, extra in cls._extras() if extra["same_if"]}

    @classmethod
    def _extras(cls) -> list[tuple[str, Any]]:
        return [(name, field.json_schema_extra) for name, field in cls.model_fields.items()]
