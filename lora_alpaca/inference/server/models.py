"""The models that a server answers as: every adapter by its name, and the base by that of its folder or hub id."""

from pathlib import Path
from typing import Any

from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.sampling import BASE
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.storage.paths import user_path


class Models:
    """Names that may be asked for; `created` is when the server began."""

    def __init__(self, generator: Generator, created: int):
        self._default, self._max_length, self._created = generator.default, generator.max_length, created
        base = generator.base_name
        base = Path(base).resolve().name if user_path(base).exists() else base  # a path says more than a client needs
        self._adapters = {name: name for name in generator.names if name != BASE}
        self._listed = list(self._adapters)
        if BASE in generator.names:
            self._listed.append(base if base and base not in self._adapters else BASE)
            self._adapters |= {self._listed[-1]: BASE, BASE: BASE}
        self.default = self.name(self._default)

    def adapter(self, model: str) -> str:
        """Return the adapter that a model's name stands for, the default one's for none. Raises ApiError 404."""
        if not model:
            return self._default
        if model not in self._adapters:
            known = ", ".join(self._listed)
            raise ApiError(404, f"there is no model {model[:200]!r}; there are {known}", "model", "model_not_found")
        return self._adapters[model]

    def name(self, adapter: str) -> str:
        """Return the name that an adapter is listed under."""
        return next(name for name in self._listed if self._adapters[name] == adapter)

    def listing(self) -> dict[str, Any]:
        """Return all models, each under one name."""
        return {"object": "list", "data": [self.entry(name) for name in self._listed]}

    def entry(self, model: str) -> dict[str, Any]:
        """Return what is told of a model. Raises ApiError 404."""
        self.adapter(model)
        found = {"id": model, "object": "model", "created": self._created, "owned_by": "lora_alpaca"}
        return found | ({"max_model_len": self._max_length} if self._max_length else {})
