"""Every way of cutting up a batch, for every family that is packed by promise: make exact.

The quick tests hold a cover of these in pairs (`test_engine.py`). Compiled parts are in here.
"""

from itertools import product

import pytest
from engines import error, make, rows, settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile, about itself

FACTORS = {
    "family": ("Llama", "Mistral", "Qwen2", "Qwen3"),
    "share": (True, False),
    "inputs": (False, True),
    "compiled": (False, True),
    "budget": (10_000, 150),
    "ranks": (1, 2),
}


@pytest.mark.parametrize(tuple(FACTORS), list(product(*FACTORS.values())))
def test_exact(family, share, inputs, compiled, budget, ranks):
    chosen = settings(share_prefix=share, token_budget=budget, compiled=compiled)
    name, off = error(make(family), rows(train_on_inputs=inputs), chosen, ranks)
    assert name == "packed"
    assert off < 1e-5
