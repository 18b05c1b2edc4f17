"""Pretrain the demo's base model, a LLaMA of 2.6 million parameters, on the prose of `corpus.py`.

    python -m lora_alpaca.demo.pretrain

It needs the tokenizer in the output folder (`train_tokenizer.py`) and about a quarter of an hour on two CPU cores.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_alpaca.demo import corpus
from lora_alpaca.demo.train_tokenizer import BASE_DIR


def pretrain(
    output_dir: Path = BASE_DIR,
    steps: int = 2600,
    batch_size: int = 20,
    sequence_length: int = 192,
    learning_rate: float = 2.5e-3,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train from random weights and save the model, in bfloat16, into `output_dir`."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)  # part of the recipe: another number of threads sums in another order
    tokenizer = SentencePieceProcessor(model_file=str(output_dir / "tokenizer.model"))
    model = LlamaForCausalLM(model_config(tokenizer))
    model.set_attn_implementation("eager")  # on a CPU the fastest, for sequences as short as these
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps * batch_size * sequence_length:,} tokens")

    optimizer = build_optimizer(model, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_cosine(step, steps))
    batches = token_batches(tokenizer, batch_size, sequence_length, seed)
    start, average_loss = time.monotonic(), None
    for step in range(1, steps + 1):
        tokens = next(batches)  # (batch_size, sequence_length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

        average_loss = loss.item() if average_loss is None else 0.95 * average_loss + 0.05 * loss.item()
        if step % 50 == 0 or step == steps:
            seconds = time.monotonic() - start
            speed = step * tokens.numel() / seconds
            print(f"step {step}/{steps}  loss {average_loss:.4f}  {seconds:.0f} s  {speed:,.0f} tokens/s", flush=True)

    model.to(torch.bfloat16).save_pretrained(output_dir)


def model_config(tokenizer: SentencePieceProcessor) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,  # at this size the vocabulary is a large part of the model
        bos_token_id=tokenizer.bos_id(),
        eos_token_id=tokenizer.eos_id(),
        pad_token_id=None,
    )


def build_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def warmup_then_cosine(step: int, steps: int, warmup: int = 60, floor: float = 0.02) -> float:
    """Return the learning rate at `step`, as a part of the highest one."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


def token_batches(
    tokenizer: SentencePieceProcessor, batch_size: int, sequence_length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield documents end to end, each between <s> and </s>, cut into full batches."""
    documents = corpus.documents(seed + 100)  # not the documents the tokenizer was trained on
    size = batch_size * sequence_length
    tokens: list[int] = []
    while True:
        while len(tokens) < size:
            tokens += [tokenizer.bos_id(), *tokenizer.encode(next(documents)), tokenizer.eos_id()]
        yield torch.tensor(tokens[:size]).view(batch_size, sequence_length)
        tokens = tokens[size:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=BASE_DIR)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    pretrain(args.output_dir, steps=args.steps, seed=args.seed, threads=args.threads)


if __name__ == "__main__":
    main()
