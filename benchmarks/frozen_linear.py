"""What does a frozen quantised layer cost? python benchmarks/frozen_linear.py

Times forward and backward of one layer, unquantised, as bitsandbytes computes it in 8 and 4 bits, and in 8 bits as
`engine/int8_linear.py` does, all interleaved, and how far each is off the product of the dequantised weights.
Writes benchmarks/results/frozen_linear-DATE.json and ends with its medians as one JSON line. A minute on 2 cores.
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F
from bitsandbytes import functional, nn
from results_file import write

from lora_alpaca.engine.allocator import keep_large_buffers
from lora_alpaca.engine.int8_linear import int8_forward
from lora_alpaca.models.device import has_bf16

IN, OUT, ROUNDS = 2048, 5504, 9
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if has_bf16(DEVICE) else torch.float32


def layers() -> dict[str, tuple[object, torch.Tensor]]:
    """Return forward and exact weight of each way to compute."""
    weight = torch.randn(OUT, IN, dtype=DTYPE) / IN**0.5
    eight = nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    eight.weight = nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    four = nn.Linear4bit(IN, OUT, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    four.weight = nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    eight, four, weight = eight.to(DEVICE), four.to(DEVICE), weight.to(DEVICE)
    eight_weight = functional.int8_vectorwise_dequant(eight.weight.CB, eight.weight.SCB).to(DTYPE)
    four_weight = functional.dequantize_4bit(four.weight.data, four.weight.quant_state).to(DTYPE)
    return {
        "unquantised": (lambda x: F.linear(x, weight), weight),
        "8-bit, bitsandbytes": (eight.train(), eight_weight),
        "8-bit, ours": (int8_forward(eight, DTYPE), eight_weight),
        "4-bit, bitsandbytes": (four, four_weight),
    }


def measure(tokens: int) -> dict[str, dict[str, float]]:
    """Return the median milliseconds, and the relative error of output and input gradient, of each way."""
    ways = layers()
    x, by_y = (torch.randn(tokens, width, dtype=DTYPE, device=DEVICE) for width in (IN, OUT))
    x.requires_grad_()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors = {}
    for round_ in range(ROUNDS + 1):
        for name, (forward, weight) in ways.items():
            begun = time.perf_counter()
            y = forward(x)  # type: ignore[operator]
            (by_x,) = torch.autograd.grad(y, x, by_y)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - begun)
            else:
                pairs = (y, x.detach().float() @ weight.float().t()), (by_x, by_y.float() @ weight.float())
                errors[name] = max(float((one.detach().float() - other).norm() / other.norm()) for one, other in pairs)
    return {
        name: {"milliseconds": round(1e3 * statistics.median(seconds[name]), 2), "error": errors[name]} for name in ways
    }


def main() -> None:
    """Measure at several numbers of tokens, and write what came of it."""
    keep_large_buffers()
    results = {f"{tokens} tokens": measure(tokens) for tokens in (128, 512, 2048)}
    for tokens, ways in results.items():
        for name, found in ways.items():
            print(f"{tokens:12} {name:28} {found['milliseconds']:8.2f} ms  error {found['error']:.1e}")
    write("frozen_linear", {"shape": [OUT, IN], "dtype": str(DTYPE), "rounds": ROUNDS, "results": results})
    print(json.dumps({tokens: {n: w["milliseconds"] for n, w in ways.items()} for tokens, ways in results.items()}))


if __name__ == "__main__":
    main()
