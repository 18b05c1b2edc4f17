"""An adapter sits where it learns: a module that no row gives a gradient to is told, or refused."""

import re
from contextlib import nullcontext

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, LLAMA_SIZES
from engines import VOCABULARY, fit, rows, settings

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.engine import equivalence
from lora_alpaca.engine.learning import require_learning
from lora_alpaca.errors import ModelError
from lora_alpaca.models import lora
from lora_alpaca.models.base import Base


def adapted(model, *names):
    base = Base("", "", None, False, model.config)
    return lora.attach(model.requires_grad_(False), FinetuneConfig(lora_target_modules=list(names)), base)


def plain(architecture="Llama", **changes):
    sizes = ARCHITECTURES[architecture] | changes
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{architecture}Config")(vocab_size=VOCABULARY, **sizes)
    )


class Experts(torch.nn.Module):
    """Routes every token to one of its experts, by its first component: only to the first few."""

    def __init__(self, reached):
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)])
        self.reached = reached

    def forward(self, x):
        chosen = (x[..., :1] > 0).long() if self.reached == 2 else torch.zeros_like(x[..., :1]).long()
        return sum((chosen == number) * expert(x) for number, expert in enumerate(self.experts[: self.reached]))


@pytest.mark.parametrize("engine", ["auto", "padded"])
def test_an_adapter_where_no_gradient_comes_is_refused(engine):
    """Rows of text alone never reach the vision tower of a model that has one."""
    text = transformers.Gemma3TextConfig(vocab_size=VOCABULARY, **LLAMA_SIZES, sliding_window=512)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=tower | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )

    def model(*names):
        return adapted(transformers.AutoModelForCausalLM.from_config(config), *names)

    expression = r"model\.language_model\.layers\..*(q_proj|v_proj)"
    said = (
        "2 of 6 modules with an adapter get no gradient from any row, so they would learn nothing "
        "(model.vision_tower.encoder.layers.0.self_attn.v_proj, model.vision_tower.encoder.layers.0.self_attn.q_proj); "
        f"name those that learn: --lora_target_modules '{expression}'"
    )
    with (
        pytest.raises(ModelError, match=re.escape(said)),
        fit(model("q_proj", "v_proj"), settings(engine=engine), rows()),
    ):
        pass
    with fit(model(expression), settings(engine=engine), rows()):
        pass


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_new_adapter_learns_everywhere(changes):
    """Though the gradient of its A is zero as long as B is."""
    base = Base("", "", None, False, None)
    model = lora.attach(plain(), FinetuneConfig(lora_target_modules="all-linear", **changes), base)
    with fit(model, settings(), rows()) as (_, lines):
        assert len(lines) == 1


@pytest.mark.parametrize(("reached", "learn"), [(1, True), (2, True), (0, False)])
def test_an_expert_that_no_row_reaches_is_told_and_not_refused(reached, learn):
    base = plain()
    base.model.layers[1].mlp = Experts(reached)
    model = adapted(base, "q_proj", r"model\.layers\.1\.mlp\.experts\.\d")
    if not learn:
        with pytest.raises(ModelError, match=r"4 of 6 modules .*; name those that learn: .*layers\\.*\(q_proj\)"):
            fit(model, settings(), rows()).__enter__()
        return
    with fit(model, settings(), rows()) as (engine, lines):
        assert engine.name == "packed"
    assert lines[0].startswith(
        f"{4 - reached} of 6 modules with an adapter get no gradient from the first 64 rows, which"
    )


def test_what_few_rows_do_not_reach_is_looked_for_in_more():
    model = adapted(plain(), "q_proj")
    with fit(model, settings(), rows()) as (engine, _):
        _, gradient = equivalence.loss_and_gradient(engine, rows())
        assert require_learning(engine, rows(), torch.zeros_like(gradient), nullcontext) == []
