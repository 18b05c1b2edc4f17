"""Attention over a pack: what it computes, by segment and in blocks, and what its gradients are computed in."""

import pytest
import torch
import torch.nn.functional as F
from engines import make, rows

from lora_alpaca.engine import attention, patches
from lora_alpaca.engine.block_attention import in_blocks
from lora_alpaca.engine.packing import pack

TENSORS = {"query": (4, 9), "key": (2, 20), "value": (2, 20)}  # heads, and tokens: 9 with a path of 11 above them


def drawn(dtype, path=20):
    """Return query, key and value of one segment."""
    shapes = [(1, heads, min(tokens, path) if tokens == 9 else path, 16) for heads, tokens in TENSORS.values()]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def path_mask(own, path, dtype):
    """Return the mask of a segment with a path above it, made token by token."""
    seen = [[key <= path - own + token for key in range(path)] for token in range(own)]
    return torch.zeros(own, path, dtype=dtype).masked_fill(~torch.tensor(seen), float("-inf"))


def gradients(attend, tensors, by_output):
    return torch.autograd.grad(attend(*tensors), tensors, by_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_are_off_by_less_than_a_number_of_16_bits_is_rounded(dtype, scale, masked, monkeypatch):
    tensors = drawn(dtype, 20 if masked else 9)
    mask = path_mask(9, 20, dtype) if masked else None
    by_output = torch.randn(1, 4, 9, 16).to(dtype)

    def plain(query, key, value):
        own = None if mask is None else mask.to(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, own, is_causal=own is None, scale=scale, enable_gqa=True
        )

    def ours(query, key, value):
        return attention._attend(query, key, value, mask, 0.0, scale)

    assert "Fp32Gradient" in str(ours(*tensors).grad_fn)
    assert torch.equal(ours(*tensors), plain(*tensors))
    kernel, dtypes = attention.GRADIENT, set()

    def watched(*inputs, **options):
        dtypes.update(one.dtype for one in [*inputs, options["attn_mask"]] if isinstance(one, torch.Tensor))
        return kernel(*inputs, **options)

    monkeypatch.setattr(attention, "GRADIENT", watched)
    exact = gradients(plain, [one.detach().double().requires_grad_() for one in tensors], by_output.double())
    found = gradients(ours, tensors, by_output)
    assert dtypes == {torch.float32}
    assert [one.dtype for one in found] == [dtype] * 3
    off = [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]
    assert max(off) < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "path", "dropout"),
    [
        (torch.float32, 20, 0.0),
        (torch.bfloat16, attention.SHORT + 1, 0.0),  # products of so many tokens are fast in 16 bits
        (torch.bfloat16, 20, 0.5),
    ],
)
def test_other_attention_is_that_of_the_library(dtype, path, dropout):
    found = attention._attend(*drawn(dtype, path), path_mask(9, path, dtype), dropout, None)
    assert "Fp32Gradient" not in str(found.grad_fn)


def test_heads_of_values_may_have_another_size():
    query, key, _ = drawn(torch.bfloat16)
    value = torch.randn(1, 2, 20, 24, dtype=torch.bfloat16)
    assert attention._attend(query, key, value, path_mask(9, 20, torch.bfloat16), 0.0, None).shape == (1, 4, 9, 24)


# ----------------------------------------------------------------------------------------- in blocks, and without packs


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_in_blocks_sees_what_attention_by_segment_sees():
    """FlexAttention runs forward on a CPU; its gradients are tested where there is a GPU."""
    packed = pack(rows())
    tokens = packed.input_ids.numel()
    query, key, value = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16)
    expected = attention._by_segment(query, key, value, packed, 0.0, None)
    assert torch.allclose(in_blocks(query, key, value, packed, 0.0, None), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [True, False])
def test_attention_in_blocks_has_the_same_gradients(share):
    packed = pack(rows(), share, "cuda")
    shapes = [(1, heads, packed.input_ids.numel(), 64) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    ours, expected = (
        torch.autograd.grad(attend(*tensors, packed, 0.0, None).square().sum(), tensors)
        for attend in (in_blocks, attention._by_segment)
    )
    for one, other in zip(ours, expected, strict=True):
        assert (one - other).norm() / other.norm() < 1e-3


def test_a_packed_call_without_its_pack_is_an_error():
    model, packed = make("Llama").get_base_model(), pack(rows())
    with patches.packed_attention(model), pytest.raises(RuntimeError, match="brings no pack"):
        model(**packed.inputs() | {"pack": None}, use_cache=False)


def test_a_padded_call_within_packed_attention_is_what_it_always_is():
    model = make("Llama").get_base_model()
    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    with patches.packed_attention(model):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
        greedy = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), greedy)
