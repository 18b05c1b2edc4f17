"""What an option is: a field with group, unit, meaning, checks and consequences; a config names all its mistakes."""

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lora_alpaca.errors import ConfigError

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


def lower(value: Any) -> Any:
    """Return a text in lower case, so that choices may be typed in any."""
    return value.lower() if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_names), Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Dtype = Annotated[Literal["auto", "bf16", "fp16", "fp32"], BeforeValidator(lower)]
Device = Annotated[Literal["auto", "cuda", "mps", "cpu"], BeforeValidator(lower)]
Engine = Annotated[Literal["auto", "packed", "padded"], BeforeValidator(lower)]
AutoBool = Annotated[Literal["auto", "true", "false"], BeforeValidator(lambda value: str(value).lower())]


class Options(BaseModel):
    """The base of every config: frozen, no unknown name, and one line for all mistakes at once."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=False, protected_namespaces=(), defer_build=True
    )
    positional: ClassVar[tuple[str, ...]] = ()  # options that are also written without their name, in this order
    wording: ClassVar[dict[str, dict[str, str]]] = {}  # option -> `help` or `auto` of this command, for shared options

    def __init__(self, **options: Any):
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ConfigError("; ".join(self._sentence(problem) for problem in error.errors())) from None

    @classmethod
    def _sentence(cls, problem: Any) -> str:
        """Return one pydantic problem as `--flag: what is wrong`."""
        where, message = problem["loc"], problem["msg"]
        if not where:  # a check over several options, raised below
            return str(problem["ctx"]["error"]) if "ctx" in problem else message
        if problem["type"] == "missing":
            return f"{' '.join(name.upper() for name in cls.positional)} are needed, and --{where[0]} is missing"
        if problem["type"] == "extra_forbidden":
            return cls.unknown(str(where[0]))
        return f"--{where[0]} {problem['input']}: {message[0].lower()}{message[1:]}"

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return the sentence for an option that does not exist, with the nearest one that does."""
        near = difflib.get_close_matches(name, cls.model_fields, n=1)
        return f"unknown flag --{name}; " + (f"did you mean --{near[0]}?" if near else "--help lists them all")

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
