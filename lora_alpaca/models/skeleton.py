"""A base model whose weights take no memory until they are spread over ranks, each of which then reads its own part.

skeleton = Skeleton(base, spec)
model = prepare(skeleton.model)  # an adapter sees devices, dtypes and shapes, as on a loaded base
for part in parts_of(model):
    skeleton.give_memory(part)  # without values, and only until the part is sharded
    shard(part)
notes = skeleton.fill(part_of_a_rank)
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.loading_report import LoadStateDictInfo

from lora_alpaca.errors import ModelError
from lora_alpaca.models import quantization
from lora_alpaca.models.base import Base, as_model_error, require_all_weights, weight_files, without_report
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.quantised_linear import EightBitLinear, FourBitLinear, Part, placeholder
from lora_alpaca.models.tensor_names import TensorNames
from lora_alpaca.models.weights import MappedFile

QUANTISED = {8: EightBitLinear, 4: FourBitLinear}


class Skeleton:
    """A frozen causal language model in eval mode, its buffers whole, its weights placeholders.

    Placeholders tell the device that the weights will be on, but `on_meta` where they are to be cast. Raises ModelError
    where weights cannot be read in parts, or are missing; `flag` is what asks for parts.
    """

    def __init__(self, base: Base, spec: DeviceSpec, flag: str, on_meta: bool = False):
        self._spec = spec
        self._placed_on = torch.device("meta") if on_meta else spec.device
        if quantization.stored(base.config):
            raise ModelError(
                f"{flag}: --base_model {base.name} is stored quantised, and is not sharded; {_instead(flag)}"
            )
        files = [MappedFile(path) for path in weight_files(base)]
        self._files = {name: file for file in files for name in file.infos}
        shapes = {name: file.infos[name][1] for name, file in self._files.items()}
        with as_model_error(f"--base_model {base.name}"), without_report():
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(
                    copy.deepcopy(base.config), trust_remote_code=base.trust_remote_code, dtype=spec.dtype
                )
            names = TensorNames(model, shapes)
            if names.converted:
                raise ModelError(
                    f"{flag}: {names.converted[0]} of --base_model {base.name} is converted while it is loaded, and is "
                    f"not sharded; {_instead(flag)}"
                )
            self._untie(model, names.stored)
            stored, self.notes = _sources(base, model, names)
            _compute_buffers(model, spec.device)
            self._places = self._put_placeholders(model, stored)
            for name, buffer in model.named_buffers():
                if name in names.stored:
                    buffer.copy_(self._files[names.stored[name]].read(names.stored[name]))
        self.model = model.eval()

    def _untie(self, model: Any, stored: dict[str, str]) -> None:
        """Part tied weights that differ in the files."""
        for target, source in list((model.all_tied_weights_keys or {}).items()):
            if target in stored and source in stored:
                one, other = (self._files[stored[name]].read(stored[name]) for name in (target, source))
                if not torch.equal(one, other):
                    module, attribute = _owner(model, target)
                    setattr(module, attribute, torch.nn.Parameter(torch.empty_like(getattr(module, attribute))))
                    model.all_tied_weights_keys.pop(target)

    def _put_placeholders(self, model: Any, stored: dict[str, str]) -> list[tuple[Any, str, str, bool]]:
        """Put placeholders into a model; return module and attribute of each, its tensor, and whether that is turned.

        A layer of GPT-2 has the transpose of the weight that it is quantised from.
        """
        transposed = set[str]()
        dtypes = _dtypes(model, stored, self._spec.dtype)
        if self._spec.bits != 16:
            self._quantise(model, transposed)
        places, made = [], dict[int, torch.nn.Parameter]()
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            module, attribute = _owner(model, name)
            if parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = placeholder(tuple(parameter.shape), dtypes[name], self._placed_on)
                    places.append((module, attribute, stored[name], False))
                setattr(module, attribute, made[id(parameter)])
            elif name in stored:
                places.append((module, attribute, stored[name], name in transposed))
        return places

    def _quantise(self, model: Any, transposed: set[str]) -> None:
        """Put layers of 8 or 4 bits where transformers puts those of bitsandbytes."""
        spec = self._spec
        quantizer = AutoHfQuantizer.from_config(quantization.bnb_config(spec.bits, spec.dtype))
        quantizer.preprocess_model(model=model, dtype=spec.dtype, device_map={"": spec.device})
        for name, module in list(model.named_modules()):
            if quantization.is_quantised(module):
                kind: Any = QUANTISED[spec.bits]
                has_bias = module.bias is not None
                layer = kind(module.in_features, module.out_features, has_bias, spec.dtype, spec.device)
                model.set_submodule(name, layer)
                if not issubclass(module.source_cls, torch.nn.Linear):
                    transposed.add(f"{name}.weight")

    def give_memory(self, module: torch.nn.Module) -> None:
        """Give the placeholders in a module memory, whose values are not set; sharding needs it."""
        made = dict[int, torch.nn.Parameter]()
        for part in module.modules():
            for attribute, parameter in list(part.named_parameters(recurse=False)):
                if parameter.is_meta or not parameter.is_contiguous():
                    if id(parameter) not in made:
                        memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._spec.device)
                        made[id(parameter)] = torch.nn.Parameter(memory, parameter.requires_grad)
                    setattr(part, attribute, made[id(parameter)])

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """Read this rank's part of every weight from the files; `part` tells it."""
        for module, attribute, name, is_transposed in self._places:
            rows = self._rows(name, is_transposed)
            if attribute == "weight" and isinstance(module, (EightBitLinear, FourBitLinear)):
                module.fill(rows, part)
                continue
            own, first = part(getattr(module, attribute))
            if own.numel():
                own.copy_(rows(first, first + len(own)) if own.dim() else self._files[name].read(name))

    def _rows(self, name: str, is_transposed: bool) -> Callable[[int, int], torch.Tensor]:
        """Return what reads rows of a weight, onto the device and in the compute dtype."""
        file, dtype, device = self._files[name], self._spec.dtype, self._spec.device

        def rows(first: int, last: int) -> torch.Tensor:
            found = file.read(name)  # a view of the mapped file: what is not used is not read
            found = found.t() if is_transposed else found
            return found[first:last].to(device, dtype)

        return rows


def _instead(flag: str) -> str:
    return f"leave {flag.split()[0]} out"


def _owner(model: Any, name: str) -> tuple[Any, str]:
    """Return the module that has a parameter, and the parameter's name there."""
    above, _, attribute = name.rpartition(".")
    return model.get_submodule(above), attribute


def _sources(base: Base, model: Any, names: TensorNames) -> tuple[dict[str, str], list[str]]:
    """Return where the parameters of a model are in the files, by all names that they have, and notes.

    Raises ModelError if the files lack some.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    stored: dict[str, str] = {}
    missing = set[str]()
    for own in aliases.values():
        source = next((names.stored[name] for name in own if name in names.stored), None)
        if source is None:
            missing.add(own[0])
        else:
            stored |= dict.fromkeys(own, source)
    info = LoadStateDictInfo(set(), set(names.unexpected), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    found = {"missing_keys": missing, "mismatched_keys": set(), "unexpected_keys": info.unexpected_keys}
    return stored, require_all_weights(base, model, found)


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Give a model on the meta device its buffers, as transformers does after it has loaded the weights."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    persistent = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    model._move_missing_keys_from_meta_to_device(persistent, {"": device}, None, None)
    model._initialize_missing_keys(False)


def _dtypes(model: Any, stored: dict[str, str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of every weight: some architectures keep a few in fp32."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return dict.fromkeys(stored, dtype)
    matches, patterns, _ = build_glob_alternation(list(plan))
    found = {name: matches.search(name) for name in stored}
    return {name: plan[patterns[match.lastgroup]] if match else dtype for name, match in found.items()}
