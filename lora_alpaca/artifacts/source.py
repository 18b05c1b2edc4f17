"""What a user names, resolved once: a base model, the adapter on it, its tokenizer and its template.

Nothing is printed here: `notes` are sentences for the user.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.artifacts.adapter_folder import AdapterInfo
from lora_alpaca.artifacts.prompt_contract import PromptContract
from lora_alpaca.config.shared import ADAPTER_DIR, DEMO
from lora_alpaca.errors import AdapterError, ConfigError, ModelError, TemplateError
from lora_alpaca.models import lora, special_tokens
from lora_alpaca.models.base import Base, locate_base
from lora_alpaca.models.fingerprint import weight_hashes
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import AnyTemplate, load_template
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.output_folder import RECORD, read_record
from lora_alpaca.storage.paths import user_path

UNCHECKED = "warning: nothing records which prompt template this model was trained with; it cannot be checked"
FINETUNED = "model"  # the kind of a record of a model that was finetuned whole
DEMO_TEMPLATE = "alpaca"  # answers of the demo base may use it unasked; an export must know the template


@dataclass(frozen=True)
class ModelSource:
    """A base, the folder of the adapter on it if there is one, what is recorded about them, and their template.

    `info` is None for a model that records nothing; `template` is not bound to the tokenizer yet.
    """

    base: Base
    adapter: Path | None
    info: AdapterInfo | None
    template: AnyTemplate
    notes: list[str]

    @property
    def contract(self) -> PromptContract | None:
        """Return the recorded prompt contract."""
        return self.info.contract if self.info else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Return the adapter's folder if a tokenizer was saved there, and None if the base's own is used.

        That is used, too, for a tokenizer that needs code, which runs from nowhere but the base.
        """
        settings = {} if self.adapter is None else read_json(self.adapter / special_tokens.CONFIG)
        return self.adapter if settings and "auto_map" not in settings else None

    def verify(self, merging: bool = False) -> list[str]:
        """Return notes on what could not be checked. Raises AdapterError for an adapter that does not fit the base.

        For `merging`, it may be of any kind that is merged.
        """
        if self.adapter is None or self.info is None:
            return []
        return adapter_folder.verify(self.adapter, self.info, self.base, merging)

    def load_tokenizer(self) -> tuple[Any, AnyTemplate, list[str]]:
        """Return the tokenizer, the template bound to it, and notes.

        Raises ContractError if the two do not give the tokens of training.
        """
        tokenizer, notes = load_tokenizer(self.base, self.tokenizer_folder, trained=self.contract is not None)
        return tokenizer, self.contract.bind(tokenizer) if self.contract else self.template.bound(tokenizer), notes


def open_source(
    base_model: str = "",
    lora_weights: str = "",
    revision: str | None = None,
    template: str = "",
    trust_remote_code: bool = False,
) -> ModelSource:
    """Return the adapter that `lora_weights` names (a folder or a hub id) on its base, or a model alone.

    Without a name, the adapter is the one in ADAPTER_DIR, if it was made for the base; `none` is no adapter. Without a
    base either, a model that was finetuned whole in ADAPTER_DIR is taken, or the demo base. Raises ConfigError,
    ModelError, AdapterError, TemplateError or ContractError.
    """
    named = named_base(base_model)
    if not named and not lora_weights and is_finetuned(Path(ADAPTER_DIR)):
        named = ADAPTER_DIR
    folder, info, notes = _choose_adapter(lora_weights, named)
    if folder is None or info is None:
        source = _open_model(named, revision, template, trust_remote_code)
        if named or lora_weights == "none":
            made = "finetuned" if is_finetuned(Path(source.base.path)) else "merged"
            notes.append(
                f"model {source.base.name}, {f'{made} by lora_alpaca' if source.info else 'without an adapter'}"
            )
        else:
            notes.append(f"no adapter in {ADAPTER_DIR} yet: answering with the untrained demo base")
    else:
        if not named and not info.base_model:
            raise ConfigError(_no_base(folder))
        source = _on_base(folder, info, named, revision, template, trust_remote_code, DEMO_TEMPLATE)
        notes.append(f"adapter {folder} on {source.base.name}")
    return replace(source, notes=[*notes, *source.notes])


def is_finetuned(folder: Path) -> bool:
    """Return whether a folder holds a model that was finetuned whole, by this library."""
    return (folder / RECORD).is_file() and read_record(folder).get("kind") == FINETUNED


def open_finetuned(folder: Path, template: str = "", trust_remote_code: bool = False) -> ModelSource:
    """Return a model that was finetuned whole, as a base without an adapter. Raises as `open_source` does."""
    return _open_model(str(folder), None, template, trust_remote_code)


def open_adapter(
    folder: Path, base_model: str = "", revision: str | None = None, template: str = "", trust_remote_code: bool = False
) -> ModelSource:
    """Return the adapter of a folder on the named base, or on the one that it records. Raises as `open_source` does."""
    info, named = adapter_folder.read_info(folder), named_base(base_model)
    if not named and not info.base_model:
        raise AdapterError(_no_base(folder))
    return _on_base(folder, info, named, revision, template, trust_remote_code)


def verify_adapter(flag: str, folder: Path, base: Base) -> list[str]:
    """Return notes on what could not be checked of an adapter to be trained further.

    Raises AdapterError, naming the flag, where the folder holds no adapter, and for one that does not fit the base.
    """
    adapter_folder.require_adapter(flag, folder)
    return adapter_folder.verify(folder, adapter_folder.read_info(folder), base)


def named_base(base_model: str) -> str:
    """Return the base that --base_model or the variable BASE_MODEL names, empty if neither does."""
    return base_model or os.environ.get("BASE_MODEL", "")


def agreed_template(asked: str, contract: PromptContract | None, where: str) -> AnyTemplate:
    """Return the template of a contract, or the one that --prompt_template asks for where there is no contract.

    Raises TemplateError if the two differ, or if there is neither.
    """
    if contract is not None:
        return contract.require_template(asked)
    if not asked:
        raise TemplateError(
            f"{where} records no prompt template; name the one it was trained with: --prompt_template alpaca"
        )
    return load_template(asked)


def _choose_adapter(lora_weights: str, named: str) -> tuple[Path | None, AdapterInfo | None, list[str]]:
    """Return folder and info of the adapter to use, if there is one, and notes."""
    default = Path(ADAPTER_DIR)
    if lora_weights == "none" or (not lora_weights and not (default / lora.CONFIG).is_file()):
        return None, None, []
    if not lora_weights:
        info = adapter_folder.read_info(default)
        if named and not _same_base(named, info):
            made_for = info.base_model or "an unknown base"
            return None, None, [f"{default} was made for {made_for}: answering with {named} alone"]
        return default, info, []
    folder = user_path(lora_weights)
    if not folder.exists() and lora_weights.count("/") == 1:
        folder = adapter_folder.download(lora_weights)
    adapter_folder.require_adapter("--lora_weights", folder)
    return folder, adapter_folder.read_info(folder), []


def _open_model(named: str, revision: str | None, asked: str, trust_remote_code: bool) -> ModelSource:
    """Return a model without an adapter: a base, or a merged model of ours, which records what an adapter does."""
    base = locate_base(named or DEMO, revision, trust_remote_code)
    folder = Path(base.path)
    info = adapter_folder.read_info(folder) if read_record(folder) else None
    if info is not None:
        weight_hashes(base)  # which checks them
    return _with_template(base, None, info, asked, DEMO_TEMPLATE)


def _on_base(
    folder: Path,
    info: AdapterInfo,
    named: str,
    revision: str | None,
    asked: str,
    trust_remote_code: bool,
    of_the_demo: str = "",
) -> ModelSource:
    if trust_remote_code and not named:  # an adapter may record anything
        raise ConfigError(
            f"--trust_remote_code runs code of the base model: name the one that you trust with --base_model; {folder} "
            f"records {info.base_model}"
        )
    if not named:
        _require_there(folder, info)
    if not named or _same_base(named, info):
        revision = revision or info.base_revision
    flag = "--base_model" if named else f"{folder}: its base"
    base = locate_base(named or info.base_model, revision, trust_remote_code, flag)
    return _with_template(base, folder, info, asked, of_the_demo)


def _with_template(
    base: Base, folder: Path | None, info: AdapterInfo | None, asked: str, of_the_demo: str = ""
) -> ModelSource:
    """Return the source with its template; `of_the_demo` is the demo base's where none is recorded or asked for."""
    contract = info.contract if info else None
    if contract is None and base.name == DEMO and not asked and of_the_demo:
        return ModelSource(base, folder, info, load_template(of_the_demo), [])
    template = agreed_template(asked, contract, str(folder or base.name))
    return ModelSource(base, folder, info, template, [] if contract else [UNCHECKED])


def _require_there(folder: Path, info: AdapterInfo) -> None:
    """Raise ModelError if the base that an adapter records is a folder, and that is not there."""
    if not info.base_is_local or Path(info.base_model).is_dir():
        return
    has_path = os.path.isabs(info.base_model)
    what = (
        f"{folder} records the base model {info.base_model}, and nothing is there"
        if has_path
        else f"{folder} was trained on a local base model named {info.base_model}, and does not record its path"
    )
    known = " (it is recognised by its hash)" if info.base_sha256 else ""
    raise ModelError(f"{what}; name where it is {'now ' if has_path else ''}with --base_model{known}")


def _same_base(named: str, info: AdapterInfo) -> bool:
    """Return whether a name means the base of an adapter: the one recorded, or a path of its folder.

    Of a base whose path is not recorded any more, the folder's name is compared; its hash is what counts in the end.
    """
    recorded = info.base_model
    if named == recorded:
        return True
    one, other = user_path(named), Path(recorded)
    if info.base_is_local and not other.is_absolute():
        return one.exists() and one.resolve().name == recorded
    return one.exists() and other.exists() and one.resolve() == other.resolve()


def _no_base(folder: Path) -> str:
    return f"{folder} does not record its base model; name it with --base_model"
