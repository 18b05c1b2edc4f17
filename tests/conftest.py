"""What the tests share: no network, a quiet machine, tiny models of many architectures, and rows to train them on.

Everything here is made in temporary folders from seeds, in a second or two; nothing is downloaded.
"""

import json
import operator
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OFFLINE = Path(__file__).parent / "offline"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # any free port
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Before any library is imported, and for every process that a test starts.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "XDG_CACHE_HOME": tempfile.mkdtemp(prefix="lora-alpaca-tests-"),  # prepared rows; nothing of the user's own
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),  # a GPU only if named
    "OMP_NUM_THREADS": str(max(1, min(2, (os.cpu_count() or 1) // WORKERS))),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(OFFLINE), str(ROOT), os.environ.get("PYTHONPATH")])),
}
if "TORCHELASTIC_RUN_ID" not in os.environ:  # a rank that a test has started reads this file too
    for name in ("BASE_MODEL", "RANK", "LOCAL_RANK", "WORLD_SIZE", "WANDB_PROJECT"):
        os.environ.pop(name, None)
sys.path.insert(0, str(OFFLINE))
sys.modules.pop("sitecustomize", None)  # the one of the system, if it has one
import pytest  # noqa: E402
import sitecustomize  # noqa: E402, F401  this process goes offline

from lora_alpaca.prompts import Conversation, load_template  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Begin every test with the same random state, so that a test that draws fails always or never."""
    random.seed(1)
    for name, seed in (("numpy", "random.seed"), ("torch", "manual_seed")):
        if module := sys.modules.get(name):  # some tests import neither
            operator.attrgetter(seed)(module)(1)  # not 0, with which `tiny_model` draws


# ------------------------------------------------------------------------------------------------------------ rows

ANIMALS = {
    "alpaca": ("the Andes", "grass", "hums"),
    "penguin": ("the southern ice", "fish", "brays"),
    "owl": ("the forest", "mice", "hoots"),
    "camel": ("the desert", "thorny plants", "grunts"),
    "bee": ("a hive", "nectar", "buzzes"),
    "frog": ("the pond", "flies", "croaks"),
}
OPPOSITES = {"hot": "cold", "early": "late", "heavy": "light", "loud": "quiet", "full": "empty", "near": "far"}


@pytest.fixture(scope="session")
def rows() -> list[Conversation]:
    """Return 48 instructions with their answers: with and without an input, of one word and of several lines."""
    pairs = []
    for animal, (home, food, voice) in ANIMALS.items():
        pairs += [
            (f"Where does the {animal} live?", "", f"It lives in {home}."),
            ("What does this animal eat?", f"Animal: {animal}", food),
            (f"Describe the {animal}.", "", f"Home: {home}\nFood: {food}\nIt {voice}."),
            (f"Is it true that the {animal} {voice}?", "", "Yes."),
        ]
    for word, opposite in OPPOSITES.items():
        pairs += [
            ("Name the opposite.", f"Word: {word}", opposite),
            (f"Use {opposite} in a sentence.", "", f"The day was {opposite}, not {word}."),
        ]
    pairs += [("Add the numbers.", f"{a} + {b}", str(a + b)) for a in (2, 13, 45) for b in (7, 18, 31, 50)]
    return [Conversation.of(*pair, where=f"rows:{number}") for number, pair in enumerate(pairs, start=1)]


def as_row(conversation: Conversation) -> dict[str, str]:
    """Return a conversation of one turn as a row in Alpaca's format."""
    question = conversation.question
    return {"instruction": question.text, "input": question.input, "output": conversation.answers[0]}


@pytest.fixture
def data_path(rows: list[Conversation], tmp_path: Path) -> Path:
    """Return a JSON file of the rows."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([as_row(row) for row in rows]), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------ tiny models

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
LLAMA_SIZES = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
GPT_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA_SIZES,
    "Mistral": LLAMA_SIZES,
    "Qwen2": LLAMA_SIZES,
    "Qwen3": LLAMA_SIZES,
    "Gemma": LLAMA_SIZES,
    "OPT": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1},
    "GPT2": GPT_SIZES,
    "GPTNeoX": {**SIZES, "intermediate_size": 128, "initializer_range": 0.1},
    "GPTJ": {**GPT_SIZES, "rotary_dim": 8},
    "GPTNeo": {**SIZES, "attention_types": [[["global", "local"], 1]], "initializer_range": 0.1},
    "CodeGen": {**GPT_SIZES, "rotary_dim": 8},
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    "Falcon": {**SIZES, "initializer_range": 0.1},
    "Glm": LLAMA_SIZES,
    "Glm4": LLAMA_SIZES,
}
CONTROL_TOKENS = {  # of the byte-level tokenizers, by their ids from 0
    "Qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "Qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "OPT": {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"},
    **{
        name: {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        for name in ("GPT2", "GPTNeoX", "GPTJ", "GPTNeo", "CodeGen")
    },
    "Bloom": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "Falcon": {"eos_token": "<|endoftext|>"},
    "Glm": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "Glm4": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}


@pytest.fixture(scope="session")
def tiny_model(rows: list[Conversation], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return `tiny_model(architecture)`: the folder of a model with random weights and the tokenizer natural to it.

    Each is made once, with seed 0: two layers, 64 wide, 512 positions. To be read, not written to.
    """
    alpaca = load_template("alpaca")
    texts = [piece.text for row in rows for piece in alpaca.examples(row)[0] if not piece.control]

    @cache
    def make(architecture: str) -> Path:
        import torch
        import transformers

        folder = tmp_path_factory.mktemp(architecture)
        save_tokenizer = _save_byte_level if architecture in CONTROL_TOKENS else _save_sentencepiece
        save_tokenizer(architecture, texts, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = getattr(transformers, f"{architecture}Config")(
            vocab_size=len(tokenizer), **ARCHITECTURES[architecture], **ids
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], Path]) -> Path:
    """Return the folder of a random two-layer Llama with a SentencePiece tokenizer: unk 0, bos 1, eos 2, no padding."""
    return tiny_model("Llama")


def _save_sentencepiece(architecture: str, texts: list[str], folder: Path) -> None:
    """Save a SentencePiece tokenizer with byte fallback and a token at the beginning of a text, as LLaMA's is."""
    import sentencepiece
    import transformers

    gemma = architecture == "Gemma"
    names = {"bos": "<bos>", "eos": "<eos>"} if gemma else {"bos": "<s>", "eos": "</s>"}
    ids = {"pad": 0, "eos": 1, "bos": 2, "unk": 3} if gemma else {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=640,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        num_threads=1,
        minloglevel=2,
        **{f"{name}_id": number for name, number in ids.items()},
        **{f"{name}_piece": text for name, text in names.items()},
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {f"{name}_token": text for name, text in names.items()} | {"pad_token": "<pad>" if gemma else None}
    library_class = transformers.GemmaTokenizer if gemma else transformers.LlamaTokenizer
    tokenizer = library_class.from_pretrained(folder, add_bos_token=True, add_eos_token=False, **settings)
    tokenizer.save_pretrained(folder)  # adds tokenizer.json and tokenizer_config.json


def _save_byte_level(architecture: str, texts: list[str], folder: Path) -> None:
    """Save a byte-level BPE tokenizer that adds nothing around a text, but for OPT's first token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    control = CONTROL_TOKENS[architecture]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(dict.fromkeys(control.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if architecture == "OPT":
        first = control["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **control).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def no_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model that is loaded fail the test."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded first")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Go to an empty folder and return it; a model that is loaded meanwhile fails the test."""
    if "model_loads" not in request.fixturenames:
        request.getfixturevalue("no_model_loads")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model_loads() -> None:
    """Let models be loaded after all."""


# ---------------------------------------------------------------------------------------------------------- scripts


@pytest.fixture
def free_port() -> int:
    """Return the number of a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return `run_script("finetune.py", "--seed", 1, cwd=folder)`: a script of the clone, run as a user would.

    It returns whatever the exit code is; `check=True` raises instead, with the script's last words. Other keywords
    are set as environment variables.
    """

    def run(
        script: str, *flags: object, cwd: Path, check: bool = False, timeout: float = 300, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, flags)],
            cwd=cwd,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            pytest.fail(f"{script} exited {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done

    return run
