"""What the environments hold: each program of others is there, in the version that the other tests speak of."""

import pytest
from environments import REQUIREMENTS, answer

pytestmark = pytest.mark.clients

MODULES = {
    "llama_cpp": ["llama_cpp", "llama_cpp.server.app", "gguf"],
    "convert": ["torch", "transformers", "sentencepiece"],
    "transformers4": ["torch", "transformers", "peft"],
    "serve": ["openai", "transformers", "fastapi", "uvicorn"],
    "mlx": ["mlx.core", "mlx_lm"],
}
VERSIONS = """
import importlib, importlib.metadata, json, sys
for name in json.load(sys.stdin)["modules"]:
    importlib.import_module(name)
print(json.dumps({one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}))
"""


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_an_environment_has_what_it_is_for(name, record_property):
    there = {
        key.lower().replace("_", "-"): value
        for key, value in answer(name, VERSIONS, {"modules": MODULES[name]}).items()
    }
    wanted = [line.split("[")[0].split("=")[0].split("<")[0].split("~")[0] for line in REQUIREMENTS[name]]
    for package in wanted:
        record_property(package, there[package])
