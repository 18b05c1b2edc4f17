"""What a CUDA card needs of the engine, as far as a CPU shows it; the tests marked `gpu` show the rest on a card."""

import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from engines import CPU, error, fit, make, rows, settings
from torch.nn.attention.flex_attention import create_block_mask

from lora_alpaca.engine import attention, block_attention, engines, equivalence, fitting, loss
from lora_alpaca.engine.block_attention import BLOCK, FULL, KERNELS, block_mask, choose_kernels
from lora_alpaca.engine.equivalence import loss_and_gradient
from lora_alpaca.engine.int8_linear import Int8Linear
from lora_alpaca.engine.packing import pack
from lora_alpaca.engine.recomputation import recomputed_in_evaluation
from lora_alpaca.engine.transfer import one_ahead
from lora_alpaca.errors import ModelError
from lora_alpaca.models.layers import library_model
from lora_alpaca.signals import StepAbandoned

on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HALVES = [torch.bfloat16, torch.float16]


# ---------------------------------------------------------------------------------------------------- 8 bits in fp16


def eight_bits(device, outputs=64, inputs=4096):
    """Return a weight in 8 bits as a model has it, its scales, inputs with outliers, and a small gradient."""
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    scale = torch.rand(outputs, device=device) * 4e-4 + 1e-5
    x = torch.randn(3, inputs, device=device, dtype=torch.float16) * 30
    return weight, scale, x.requires_grad_(), torch.randn(3, outputs, device=device).mul(3e-4).half()


@pytest.mark.parametrize("device", [CPU, pytest.param("cuda", marks=[pytest.mark.gpu, on_a_card])])
def test_8_bits_in_fp16_neither_overflow_nor_underflow(device):
    weight, scale, x, by_y = eight_bits(device)
    assert not (x @ weight.t().half()).isfinite().all(), "the unscaled product fits: this tests nothing"
    y = Int8Linear.apply(x, weight, scale)
    (by_x,) = torch.autograd.grad(y, x, by_y)
    exact = weight.double() * scale.double()[:, None]
    for found, expected in ((y, x.double() @ exact.t()), (by_x, by_y.double() @ exact)):
        assert (found - expected).norm() < 2e-3 * expected.norm()


# --------------------------------------------------------------------------------------------- attention in blocks


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("count", [1, 3, 11, 40])
def test_the_mask_of_blocks_is_the_one_of_all_pairs(count, share):
    packed = pack(rows(count, seed=count), share)
    ends = packed.subtree_ends()

    def sees(batch, head, query, key):
        return (key <= query) & (query < ends[key])

    found, expected = block_mask(packed, CPU), create_block_mask(sees, None, None, len(ends), len(ends), "cpu")
    assert found.seq_lengths == expected.seq_lengths
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers = getattr(expected, f"{kind}_num_blocks")
        assert torch.equal(getattr(found, f"{kind}_num_blocks"), numbers)
        seen = torch.arange(numbers.shape[-1]) < numbers[..., None]
        indices = [getattr(one, f"{kind}_indices")[seen] for one in (found, expected)]
        assert torch.equal(*indices)
    assert len(ends) > 3 * BLOCK or count < 40


class OutOfResources(Exception):
    """What the compiler of kernels raises."""


def a_card_that_holds(side, seen):
    """Return an attempt that fails for want of shared memory where the blocks are larger."""

    def attempt(heads, size, dtype, device, options):
        seen.append((heads, size, dtype, options.get("fwd_BLOCK_M", 128)))
        if seen[-1][-1] > side:
            try:
                raise OutOfResources("out of resource: shared memory, Required: 114688, Hardware limit: 65536")
            except OutOfResources as error:
                raise RuntimeError("backend='inductor' raised an error") from error

    return attempt


@pytest.mark.parametrize(("side", "chosen"), [(128, FULL), (64, KERNELS[1]), (16, KERNELS[3]), (8, FULL)])
def test_blocks_are_made_smaller_until_shared_memory_holds_them(side, chosen, monkeypatch):
    monkeypatch.setattr(block_attention, "_chosen", {})
    config, seen = make("Llama", num_key_value_heads=2).config, []
    notes = choose_kernels(config, [torch.float16], CPU, a_card_that_holds(side, seen))
    assert block_attention._chosen == {(16, torch.float16): chosen}
    assert {one[:3] for one in seen} == {((4, 2), 16, torch.float16)}
    assert notes == (
        [
            f"heads of 16 in float16 attend in blocks of {side} tokens: larger ones do not fit into the shared memory "
            "of this card"
        ]
        if chosen
        else []
    )
    tried = len(seen)
    choose_kernels(config, [torch.float16], CPU, a_card_that_holds(side, seen))
    assert len(seen) == tried  # once a process


def test_another_error_of_a_kernel_is_left_to_the_comparison(monkeypatch):
    monkeypatch.setattr(block_attention, "_chosen", {})

    def broken(*_):
        raise RuntimeError("no backend")

    assert choose_kernels(make("Llama").config, [torch.float16], CPU, broken) == []
    assert list(block_attention._chosen.values()) == [FULL]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_chosen_blocks_are_those_that_attend(monkeypatch):
    monkeypatch.setattr(block_attention, "_chosen", {(16, torch.float32): KERNELS[2]})
    packed, given = pack(rows()), []
    tensor = torch.randn(1, 4, packed.input_ids.numel(), 16)
    monkeypatch.setattr(block_attention, "_flex_attention", lambda _: lambda *_, **options: given.append(options))
    block_attention.in_blocks(tensor, tensor, tensor, packed, 0.0, None)
    block_attention.in_blocks(tensor.double(), tensor.double(), tensor.double(), packed, 0.0, None)
    assert [one["kernel_options"] for one in given] == [KERNELS[2], None]


@pytest.mark.gpu
@on_a_card
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("options", KERNELS)
def test_attention_in_blocks_of_every_size_has_the_gradients_of_segments(options, size, dtype, monkeypatch):
    """Which of them fit, the card tells; those that do compute the same."""
    packed = pack(rows(40), device="cuda")
    shapes = [(1, heads, packed.input_ids.numel(), size) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    monkeypatch.setattr(block_attention, "_chosen", {(size, dtype): options})
    try:
        found = torch.autograd.grad(block_attention.in_blocks(*tensors, packed, 0.0, None).sum(), tensors)
    except Exception as failure:
        if block_attention._lacks_shared_memory(failure):
            pytest.skip(f"blocks of {options or 'the library'} are too large for this card")
        raise
    expected = torch.autograd.grad(attention._by_segment(*tensors, packed, 0.0, None).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() / other.norm() < (1e-3 if dtype == torch.float32 else 2e-2)


# ----------------------------------------------------------------------------------------------- the check at start


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_dropout_that_packs_do_not_have_is_found_before_the_first_step(dropout, monkeypatch):
    segments = attention._by_segment
    monkeypatch.setattr(attention, "_by_segment", lambda *inputs: without_dropout_by(segments, *inputs))
    model, examples = make("Llama", attention_dropout=dropout), rows()
    state = torch.get_rng_state()
    with fit(model, settings(), examples) as (engine, notes):
        assert torch.equal(torch.get_rng_state(), state)
        assert engine.name == ("padded" if dropout else "packed")
        assert ("dropout of 0.1, which FlexAttention does not know" in " ".join(notes)) == bool(dropout)
        model.train()
        loss_and_gradient(engine, examples)  # and training does not stop


def without_dropout_by(segments, query, key, value, pack, dropout, scale):
    """Attend by segments, as FlexAttention does: not with dropout."""
    if dropout:
        raise NotImplementedError(f"its attention has a dropout of {dropout}, which FlexAttention does not know")
    return segments(query, key, value, pack, dropout, scale)


@pytest.mark.gpu
@on_a_card
def test_a_model_with_attention_dropout_trains_on_a_card():
    model, examples = make("Llama", attention_dropout=0.1).cuda(), rows()
    with fit(model, settings(device=torch.device("cuda")), examples) as (engine, notes):
        assert engine.name == "padded", notes
        loss_and_gradient(engine, examples)


def noted(sizes, tensor):
    """Return a tensor, its size noted."""
    sizes.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT", "Mamba"])
def test_the_check_keeps_as_little_as_a_step_that_recomputes(family):
    """Without dropout, though the library recomputes only where there is some."""
    changes = {"GPT2": {"resid_pdrop": 0.5}, "OPT": {"dropout": 0.5}}.get(family, {})
    model, examples = make(family, **changes).eval(), rows()
    with fit(model, settings(engine="padded"), examples) as (engine, _):
        expected = loss_and_gradient(engine, examples)
    kept = {}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    base = library_model(model)
    before = [(part.training, dict(vars(part))) for part in base.modules()]
    for recomputes in (False, True):
        with fit(model, settings(engine="padded", checked=True), examples) as (engine, _):
            sizes = []
            with (
                torch.autograd.graph.saved_tensors_hooks(partial(noted, sizes), lambda one: one),
                recomputed_in_evaluation(base) if recomputes else pytest.MonkeyPatch.context(),
            ):
                found = loss_and_gradient(engine, examples)
        kept[recomputes] = sum(sizes)
        assert equivalence.difference(found, expected) < 1e-6
    assert kept[True] < 0.5 * kept[False]
    assert [(part.training, dict(vars(part))) for part in base.modules()] == before


def short_of_memory_above(tokens, real=equivalence.loss_and_gradient):
    """Return a computation of gradients that lacks memory where a pack has more tokens."""

    def compute(engine, examples, precision):
        if engine.name == "packed":
            largest = max(batch.input_ids.numel() for batch in engine.batches(examples))
            if largest > tokens:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {largest} MiB.")
        return real(engine, examples, precision)

    return compute


def test_a_check_that_lacks_memory_makes_packs_smaller_and_not_slow(monkeypatch):
    examples = rows()
    longest = max(len(row.ids) for row in examples)
    monkeypatch.setattr(equivalence, "loss_and_gradient", short_of_memory_above(longest))
    with fit(make("Llama"), settings(), examples) as (engine, notes):
        assert engine.name == "packed"
        assert engine.token_budget < 200
        assert notes[0].startswith("out of memory with packs of 200 tokens (CUDA out of memory. Tried to allocate")
        assert notes[0].endswith("the batch stays as it is")
    assert error(make("Llama"), examples, settings(token_budget=engine.token_budget))[1] < 1e-5


def test_memory_that_holds_no_row_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(equivalence, "loss_and_gradient", short_of_memory_above(5))
    with (
        pytest.raises(ModelError, match=r"out of memory with a pack of \d+ tokens; .* lower --cutoff_len, or say"),
        fit(make("Llama"), settings(), rows()),
    ):
        pass


def mixed(share, right=attention._by_segment):
    """Return attention that lets every token see a little of the whole pack."""

    def attend(query, key, value, pack, dropout, scale):
        wrong = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return (1 - share) * right(query, key, value, pack, dropout, scale) + share * wrong

    return attend


@pytest.mark.parametrize(
    ("family", "layers", "dtype"),
    [
        ("Llama", 2, torch.float16),
        ("Llama", 12, torch.bfloat16),
        ("Gemma", 2, torch.bfloat16),
        ("GPT2", 2, torch.bfloat16),
    ],
)
def test_16_bits_alone_tell_a_fault_of_five_per_cent_from_rounding(family, layers, dtype, monkeypatch):
    """Where no slice can be compared in fp32: the limit is what rounding makes of the same model."""
    monkeypatch.setattr(fitting, "_compare_slice", lambda *_: ("", ["no slice was compared"]))
    model = make(family, **({"num_hidden_layers": layers} if layers > 2 else {}))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    precision, found = partial(torch.autocast, "cpu", dtype), {}
    for share in (0.0, 0.05):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_by_segment", mixed(share))
            with fit(model, settings(dtype=dtype), rows(), precision) as (engine, _):
                found[share] = engine.name
    assert found == {0.0: "packed", 0.05: "padded"}


def test_where_a_slice_was_compared_in_fp32_rounding_is_no_reason_against_packs(monkeypatch):
    """A pretrained model was refused packs that were three times as far off as its rounding, and right."""
    monkeypatch.setattr(equivalence, "ROUNDED_MARGIN", 1e-6)
    monkeypatch.setattr(equivalence, "ROUNDINGS", 1e-6)
    model = make("Llama")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    precision = partial(torch.autocast, "cpu", torch.bfloat16)
    with fit(model, settings(dtype=torch.bfloat16), rows(), precision) as (engine, notes):
        assert engine.name == "packed", notes


# ------------------------------------------------------------------------------------------------------ on the way


@pytest.mark.gpu
@on_a_card
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rows_in_a_pack_are_what_they_are_alone_on_a_card(dtype):
    model, examples, device = make("Llama").cuda(), rows(), torch.device("cuda")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    precision = partial(torch.autocast, "cuda", dtype, enabled=dtype != torch.float32)
    with fit(model, settings(device=device, dtype=dtype), examples, precision) as (engine, notes):
        assert engine.name == "packed", notes


class Cuda:
    """Takes the place of torch.cuda where there is no card."""

    def __init__(self, gigabytes):
        self._size = gigabytes * 10**9

    def is_available(self):
        return self._size > 0

    def get_device_properties(self, device):
        return SimpleNamespace(total_memory=self._size)


@pytest.mark.parametrize(
    ("gigabytes", "vocabulary", "rows_a_piece"),
    [(16, 32_000, 1024), (80, 128_256, 1024), (16, 128_256, 779), (0, 128_256, 1024), (16, 4_000, 2097)],
)
def test_a_card_computes_the_loss_of_many_rows_at_a_time(gigabytes, vocabulary, rows_a_piece, monkeypatch):
    monkeypatch.setattr(torch, "cuda", Cuda(gigabytes))
    assert loss.piece_bytes(torch.device("cuda"), vocabulary) // (4 * vocabulary) == rows_a_piece
    assert loss.piece_bytes(CPU, vocabulary) == 32 * 2**20


def test_batches_are_made_one_ahead_in_a_thread():
    made, threads = [], set()

    def making():
        for number in range(5):
            made.append(number)
            threads.add(threading.current_thread().name)
            yield number

    with one_ahead(making()) as items:
        for number in items:
            assert len(made) <= number + 3  # one in hand, one that waits, one that is being made
            assert number in made
    assert made == list(range(5))
    assert threads == {"batches"}


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_whoever_leaves_early_leaves_no_thread(taken):
    """As a signal does, which ends the step under way."""
    with pytest.raises(StepAbandoned), one_ahead(iter(range(1000))) as items:
        for _ in range(taken):
            next(items)
        raise StepAbandoned
    assert "batches" not in {thread.name for thread in threading.enumerate()}


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for():
    def failing():
        yield 1
        raise torch.OutOfMemoryError("CUDA out of memory")

    with one_ahead(failing()) as items:
        assert next(items) == 1
        with pytest.raises(torch.OutOfMemoryError):
            next(items)


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_batches_for_a_card_are_those_for_a_cpu(engine, monkeypatch):
    copied = []
    monkeypatch.setattr(engines, "pinned", lambda batch: batch)
    monkeypatch.setattr(engines, "moved", lambda batch, device: copied.append(device) or batch)
    with fit(make("Llama"), settings(engine=engine, token_budget=100), rows()) as (here, _):
        there = replace(here, device=torch.device("cuda"))
        found, expected = list(there.batches(rows())), list(here.batches(rows()))
    assert len(copied) == len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert one.rows == other.rows
        assert all(torch.equal(one.inputs()[name], other.inputs()[name]) for name in one.inputs() if name != "pack")


@pytest.mark.gpu
@on_a_card
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_batches_on_a_card_have_the_losses_of_a_cpu(engine):
    model, examples = make("Llama"), rows()
    with fit(model, settings(engine=engine), examples) as (here, _):
        expected = loss_and_gradient(here, examples)
    with fit(model.cuda(), settings(engine=engine, device=torch.device("cuda")), examples) as (there, notes):
        assert there.name == engine, notes
        assert equivalence.difference(loss_and_gradient(there, examples), expected) < 1e-3
