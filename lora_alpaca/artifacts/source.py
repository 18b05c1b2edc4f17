"""What a user names, resolved once: base, adapter, tokenizer and template."""

from lora_alpaca.artifacts.prompt_contract import PromptContract
from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts import AnyTemplate, load_template

UNCHECKED = "warning: nothing records which prompt template this model was trained with; it cannot be checked"


def agreed_template(asked: str, contract: PromptContract | None, where: str) -> AnyTemplate:
    """Return the template to use with a model: that of its contract, or the one asked for by --prompt_template.

    Raises TemplateError if they differ, or if there is neither.
    """
    if contract is not None:
        return contract.template_asked(asked)
    if not asked:
        raise TemplateError(
            f"{where} records no prompt template; name the one it was trained with: --prompt_template alpaca"
        )
    return load_template(asked)
