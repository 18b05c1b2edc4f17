"""PEFT is imported without torch's compiler, and what bitsandbytes compiles is compiled when it is called."""

import subprocess
import sys
from typing import Any

from conftest import ROOT

from lora_alpaca.models.quick_import import _deferred


def test_no_compiler_is_loaded_for_an_answer() -> None:
    program = (
        "import sys, torch; before = torch.compile\n"
        "import lora_alpaca.inference.generator, lora_alpaca.training\n"
        "assert torch.compile is before and 'bitsandbytes' in sys.modules and 'peft' in sys.modules\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


def test_a_function_is_compiled_once_when_it_is_first_called() -> None:
    asked: list[Any] = []

    def compile(function: Any, **options: Any) -> Any:
        asked.append((function, options))
        return lambda number: 10 * function(number)

    def double(number: int) -> int:
        return 2 * number

    wrapped = _deferred(compile)(double, dynamic=False)
    assert wrapped.__name__ == "double" and asked == []
    assert [wrapped(1), wrapped(2)] == [20, 40]
    assert asked == [(double, {"dynamic": False})]
