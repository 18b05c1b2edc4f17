"""Stage 6: answers."""

import subprocess
import time

from gpu_stages.stage import Stage
from lora_alpaca import GenerateConfig, Generator


def run(stage: Stage) -> None:
    """Answers of the demo with an adapter: the seconds of a command, and tokens a second, one and many at a time."""
    folder = stage.adapter()
    words = ["generate", "--lora_weights", folder, "--instruction", "Name the opposite of hot.", "--max_new_tokens", 16]
    begun = time.perf_counter()
    done = subprocess.run(stage.command(*words, "--temperature", 0), check=True, capture_output=True, text=True)
    stage.tell(command_seconds=time.perf_counter() - begun, answer=done.stdout.strip()[-80:])
    generator = Generator.load(GenerateConfig(lora_weights=str(folder), device=stage.device, temperature=0))
    asked = [f"Name the opposite of {word}." for word in ("hot", "young", "big", "dark")] * (1 if stage.tiny else 8)
    for name, prompts in (("one", asked[:1]), ("many", asked)):
        begun = time.perf_counter()
        replies = list(generator.batch(prompts))
        seconds = time.perf_counter() - begun
        stage.tell(**{name: {"answers": len(replies), "seconds": seconds}}, reply=replies[0][:80])
