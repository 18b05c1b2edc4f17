"""A scheduler and the questions that it is asked, beside what transformers answers to them."""

import torch
import transformers

from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.sampling import BASE, Request, Sampling
from lora_alpaca.inference.scheduler.scheduler import Scheduler, token_generator

GREEDY = Sampling(temperature=0, max_new_tokens=12)


def random_prompts(number, longest, vocabulary=600, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (number,), generator=numbers).tolist()
    return [torch.randint(5, vocabulary, (length,), generator=numbers).tolist() for length in lengths]


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def scheduled(model, places=32, adapters=None):
    tokens, notes = token_generator(adapters or Adapters(model), places, 512)
    assert isinstance(tokens, Scheduler), notes
    return tokens


def ask(tokens, prompt, sampling=GREEDY, stop_ids=(2,), **options):
    return tokens.generate(Request(prompt, sampling, stop_ids, **options))


def ids(stream):
    return [token.id for step in stream for token in step]


@torch.inference_mode()
def generated(model, prompt, length=12, **options):
    """Return what `generate` of transformers answers."""
    given = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0} | options
    output = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=length, **options)
    return output[0, len(prompt) :].tolist()


def two_adapters(tiny_llama):
    """Return adapters that are heads of a model, and the model's answers with each."""
    model = load(tiny_llama)
    heads = {name: torch.randn_like(model.lm_head.weight) * 0.1 for name in ("a", "b")}
    heads[BASE] = model.lm_head.weight.detach().clone()

    def put(name):
        model.lm_head.weight.data = heads[name]

    put("a")
    return Adapters(model, ("a", "b"), put), put


class Only:
    """A constraint: some tokens, and after a number of them an error."""

    def __init__(self, allowed, fails_after=1000, vocabulary=640):
        self.mask = torch.zeros(vocabulary, dtype=torch.bool)
        self.mask[allowed] = True
        self.seen, self.fails_after = [], fails_after

    def allowed(self):
        if len(self.seen) >= self.fails_after:
            raise ZeroDivisionError
        return self.mask

    def accept(self, token):
        self.seen.append(token)
