"""Would a product of int8 numbers serve in the place of one in bf16? python benchmarks/int8_product.py

Rounds activations to 8 bits, each row by its largest number, and multiplies them by int8 weights: how far that is off
the exact product, and how many operations a second it does, beside bf16. Activations are normal random numbers, then
with 4 columns of 2048 that are 30 times larger, as some channels of trained models are. One thread, processor time.
Writes benchmarks/results/int8_product-DATE.json; the last line is JSON. A few seconds.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
from results_file import write

ROWS, IN, OUT, ROUNDS = 1024, 2048, 2048, 5
LARGER = {"normal": 1, "with large columns": 30}


def in_bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the product of bf16 activations with weights converted to bf16."""
    return torch.mm(x, weight.to(x.dtype).t())


def in_int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the product of activations rounded to int8."""
    scale = x.float().abs().amax(1, keepdim=True) / 127  # [ROWS, 1]
    return (torch._int_mm((x / scale).round().to(torch.int8), weight.t()) * scale).to(x.dtype)


def rate(product: Callable[[], torch.Tensor]) -> float:
    """Return the median operations a second of a product, in 1e9."""
    seconds = []
    for _ in range(ROUNDS + 1):
        begun = time.process_time()
        product()
        seconds.append(time.process_time() - begun)
    return 2e-9 * ROWS * IN * OUT / statistics.median(seconds[1:])


def main() -> None:
    """Measure, and write what came of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)
    errors: dict[str, dict[str, float]] = {}
    for kind, larger in LARGER.items():
        x = torch.randn(ROWS, IN)
        x[:, :4] *= larger
        x = x.bfloat16()
        exact = x.double() @ weight.double().t()
        errors[kind] = {
            name: float(f"{(product(x, weight).double() - exact).norm() / exact.norm():.2g}")
            for name, product in {"bf16": in_bf16, "int8": in_int8}.items()
        }
    converted, rounded = weight.to(x.dtype), x.round().clamp(-127, 127).to(torch.int8)
    rates = {
        "bf16": round(rate(lambda: torch.mm(x, converted.t()))),
        "int8": round(rate(lambda: torch._int_mm(rounded, weight.t()))),
    }
    write("int8_product", {"shape": [ROWS, IN, OUT], "errors": errors, "giga_operations_per_second": rates})
    print(json.dumps({"errors": errors, "giga_operations_per_second": rates}))


if __name__ == "__main__":
    main()
