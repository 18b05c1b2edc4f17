"""The functions of kernels.cpp, compiled for this processor by the C++ compiler that is here, and kept in the cache."""

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import torch

from lora_alpaca.storage.handles import make_private
from lora_alpaca.storage.paths import user_cache

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-w")
COMPILERS = ("g++", "clang++", "c++")
NOTHING = subprocess.DEVNULL
LONGEST = 120.0  # seconds that the compiler is waited for
CAPABLE = ("AVX2", "AVX512")  # processors, as torch calls what they can do
WARM = 32  # steps without the functions before they are compiled: a short answer is over before
F32, BF16, INT8, NF4 = range(4)

Number, Real, Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Matrix(ctypes.Structure):
    """See kernels.cpp."""

    _fields_ = (
        ("kind", Number), ("rows", Number), ("columns", Number),
        ("values", Pointer), ("scales", Pointer), ("bias", Pointer),
    )  # fmt: skip


class Linear(ctypes.Structure):
    """See kernels.cpp."""

    _fields_ = (("weight", Matrix), ("a", Matrix), ("b", Matrix))


class Layer(ctypes.Structure):
    """See kernels.cpp."""

    _fields_ = (
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Pointer) for name in ("norm_in", "norm_mlp", "norm_q", "norm_k")),
        ("window", Number),
    )


class Model(ctypes.Structure):
    """See kernels.cpp."""

    _fields_ = (
        *((name, Number) for name in ("layers", "width", "heads", "groups", "head_size", "inner")),
        ("epsilon", Real), ("scaling", Real), ("layer", ctypes.POINTER(Layer)),
        ("embeddings", Matrix), ("head", Linear), ("norm", Pointer),
    )  # fmt: skip


class Step(ctypes.Structure):
    """See kernels.cpp."""

    _fields_ = (
        *((name, Number) for name in ("tokens", "kept", "threads", "length", "is_bf16")),
        *((name, Pointer) for name in ("ids", "rows", "positions", "turns", "keep", "cosines", "sines")),
        *((name, Pointer) for name in ("keys", "values", "memory", "logits")),
    )


class Functions:
    """The compiled functions. Unless the cache has them, they are compiled beside the first answers that are long."""

    def __init__(self, found: ctypes.CDLL | None = None) -> None:
        self._asked = 0
        self.found = found or load()

    def ready(self) -> ctypes.CDLL | None:
        """Return the functions if they are there. Called at every step: after some of them, a thread compiles."""
        if self.found is None:
            self._asked += 1
            if self._asked == WARM:
                threading.Thread(target=self._compile, daemon=True).start()
        return self.found

    def _compile(self) -> None:
        self.found = compile_source()


def load() -> ctypes.CDLL | None:
    """Return the compiled functions if they are in the cache."""
    path = _path()
    if path is None or not path.is_file():
        return None
    with suppress(OSError):
        if make_private(path.parent):  # what others can write there would be run here
            return None
        functions = ctypes.CDLL(str(path))
        functions.memory_needed.restype = Number
        return functions
    return None


def compile_source() -> ctypes.CDLL | None:
    """Compile the functions, which takes a second or two, and return them; None where that is not possible."""
    path, compiler = _path(), next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if path is None or compiler is None:
        return None
    made = path.with_suffix(f".{os.getpid()}")
    try:
        if make_private(path.parent):
            return None
        process = subprocess.Popen(
            [compiler, *FLAGS, "-o", made, SOURCE], stdin=NOTHING, stdout=NOTHING, stderr=NOTHING
        )
        atexit.register(process.kill)
        if process.wait(LONGEST) == 0:
            os.replace(made, path)
        atexit.unregister(process.kill)
    except (OSError, subprocess.SubprocessError):
        return None
    finally:
        made.unlink(missing_ok=True)
    return load()


def _path() -> Path | None:
    """Return where the compiled functions are, or will be, by source, flags and processor; None where they are not.

    With narrow vectors the library's layers may well be faster.
    """
    if os.name == "nt" or torch.backends.cpu.get_cpu_capability() not in CAPABLE:
        return None
    facts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), _processor().encode())
    return user_cache() / "kernels" / f"{hashlib.sha256(b'|'.join(facts)).hexdigest()[:32]}.so"


def _processor() -> str:
    """Return what a processor is called and what it can do: home folders are shared by machines."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return f"{platform.machine()} {line}"
    return f"{platform.machine()} {platform.processor()} {platform.node()}"
