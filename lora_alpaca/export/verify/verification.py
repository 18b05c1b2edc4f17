"""Is what is served what was trained? A server is asked the probes of a served receipt, and a page has the verdict."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_alpaca.config import VerifyConfig
from lora_alpaca.config.shared import ADAPTER_DIR, EXPORT_DIR
from lora_alpaca.errors import ConfigError, ExportError, visible
from lora_alpaca.export.verify import served_receipt
from lora_alpaca.export.verify.comparison import compare
from lora_alpaca.export.verify.endpoint import Endpoint, key_of
from lora_alpaca.export.verify.served_receipt import Answer, Probe, ServedReceipt
from lora_alpaca.export.verify.verdict import Figures, Replies, Verdict, decide
from lora_alpaca.storage.paths import user_path

TWICE = 4  # probes that are asked again with another seed: those whose answers are the least certain
BY_IDS = 4  # probes that are asked by their ids where the text gives another answer
SHOWN = 160  # characters of a text on the page

SAYS = {
    "equal": "equal: the server answers as the trained model, token for token",
    "rounding": "equal but for rounding: the server answers as the trained model, computed in fewer bits",
    "prompt": "another prompt: the weights are those that were trained, and the server prompts them otherwise",
    "base": "the adapter is not applied: the server answers as the base model does",
    "late": "answers do not stop: the server goes on behind the token that ends an answer",
    "early": "answers stop too early: the server ends them where the trained model goes on",
    "quantised": "quantised: the weights are those that were trained, changed by more than rounding",
    "other": "another model: the server answers neither as the trained model nor as its base",
    "sampling": "sampling is on: the same question twice gives different answers, though temperature 0 was asked for",
}
ADVICE = {
    "equal": "",
    "rounding": "Nothing is to be done.",
    "prompt": "Let the server use the chat template of the exported folder (vLLM and SGLang: --chat-template FILE; "
    "llama.cpp: --jinja --chat-template-file FILE; Ollama: the Modelfile beside the GGUF file). If it is the "
    "completions that differ, see that the beginning-of-text token is not added twice.",
    "base": "Serve the exported folder itself; or name the adapter as the model (vLLM: --enable-lora --lora-modules "
    "NAME=FOLDER, and --model NAME here; llama.cpp: --lora FILE).",
    "late": "The server does not know the token that ends an answer: use the generation_config.json and tokenizer "
    "files of the exported folder, and no --ignore-eos; of a GGUF file, write it again.",
    "early": "Look for stop words, and for a limit of tokens, in the settings of the server.",
    "quantised": "If the file is meant to be quantised, this is what it costs; else serve the weights in 16 bits.",
    "other": "See that --model names this model, and that --receipt is the folder that the server was given.",
    "sampling": "Turn off what overrides the temperature of a request: a preset of the server, a proxy, --temp of "
    "a wrapper. Nothing else can be told while answers are drawn at random.",
}


def verify(config: VerifyConfig) -> None:
    """Print whether a server answers as the trained model.

    Raises ExportError if it does not, ConfigError if it cannot be asked.
    """
    folder = _receipt_folder(config.receipt)
    receipt = served_receipt.read(folder, "--receipt")
    endpoint = Endpoint(config.endpoint, config.model, key_of(config.api_key_file), config.timeout)
    try:
        replies = ask(endpoint, receipt)
    finally:
        endpoint.close()
    verdict = decide(receipt, replies, list(_not_asked(endpoint, receipt)))
    if verdict.kind == "nothing":
        said = next(iter(endpoint.refused.values()), "no probe of the receipt fits")
        raise ConfigError(f"--endpoint {endpoint.url}: gives no answers ({said}); see --model {endpoint.model}")
    print(visible(f"{endpoint.url}, model {endpoint.model}, held to {folder / served_receipt.FILE}\n"))
    print(visible(page(verdict, receipt)))
    if not verdict.is_equal:
        raise ExportError(f"--endpoint {endpoint.url}: {SAYS[verdict.kind]}")


def ask(endpoint: Endpoint, receipt: ServedReceipt) -> list[Replies]:
    """Return what a server answers to every probe."""
    length = receipt.new_tokens
    unsure = sorted(receipt.probes, key=_certainty)[:TWICE]
    replies, differing = [], 0
    for probe in receipt.probes:
        completion = endpoint.complete(probe.prompt, length) if probe.prompt is not None else None
        chat = endpoint.chat(probe.messages, length) if probe.messages is not None else None
        again = ids = None
        if any(probe is one for one in unsure):
            if completion is not None and probe.prompt is not None:
                again = endpoint.complete(probe.prompt, length, seed=1)
            elif chat is not None and probe.messages is not None:
                again = endpoint.chat(probe.messages, length, seed=1)
        if completion is not None and not compare(completion, probe.tuned, receipt.stop_ids, length).same:
            differing += 1
            ids = endpoint.complete(probe.prompt_ids, length) if differing <= BY_IDS else None
        replies.append(Replies(completion, chat, ids, again))
    return replies


def _certainty(probe: Probe) -> float:
    """Return the log-probability of the trained model's answer: the lower, the sooner sampling changes it."""
    return sum(place[0].logprob for place in probe.tuned.places[: probe.tuned.ends])


def _receipt_folder(named: str) -> Path:
    """Return the folder with the receipt: the one named, or the first of the default ones that holds it."""
    folders = [user_path(named)] if named else [Path(EXPORT_DIR), Path(ADAPTER_DIR)]
    for folder in folders:  # of several formats, each is a folder in it
        for place in (folder, *sorted(folder.glob("*/")), folder.parent):
            if (place / served_receipt.FILE).is_file():
                return place
    return folders[0]


def _not_asked(endpoint: Endpoint, receipt: ServedReceipt) -> Iterator[str]:
    """Yield what the server was not asked, and why."""
    for path, what, there in (
        ("completions", "the prompt as text", any(probe.prompt is not None for probe in receipt.probes)),
        ("chat/completions", "the chat template", any(probe.messages is not None for probe in receipt.probes)),
    ):
        if not there:
            yield f"{what}: the receipt has no such probe"
        elif not endpoint.answers(path):
            yield f"{what}: the server does not answer /{path} ({endpoint.refused.get(path, 'no answer')})"


# ---------------------------------------------------------------------------------------------------------- the page


def page(verdict: Verdict, receipt: ServedReceipt) -> str:
    """Return a verdict and its evidence in plain words."""
    lines = [("EQUAL: " if verdict.is_equal else "NOT EQUAL: ") + SAYS[verdict.kind], ""]
    for route, figures in verdict.tuned.items():
        lines += _figures(route, figures, verdict.plain[route], verdict.extra_tokens[route], verdict.kind)
    if verdict.shown is not None:
        probe, route, reply = verdict.shown
        lines += ["", f"the first answer that differs, to the probe {probe.name!r} ({route}):"]
        lines += [f"    trained  {_quoted(probe.tuned)}", f"    base     {_quoted(probe.plain)}"]
        lines += [f"    served   {reply.text.strip()[:SHOWN]!r}" + f" ({reply.finish})" * bool(reply.finish)]
    if ADVICE[verdict.kind]:
        lines += ["", f"what to do: {ADVICE[verdict.kind]}"]
    lines += [line for one in verdict.unchecked for line in ("", f"not checked: {one}")]
    return "\n".join(lines)


def _figures(route: str, tuned: Figures, plain: Figures, extra: Sequence[int], kind: str) -> Iterator[str]:
    """Yield the figures of a route."""
    name = f"{route}:"
    yield f"{name:13}{tuned.same} of {tuned.asked} answers as trained ({tuned.share:.0%} of the tokens)"
    if tuned.same != tuned.asked:
        yield f"{'':13}{plain.same} of {plain.asked} answers as the base alone gives them"
    if tuned.ties:
        yield f"{'':13}{len(tuned.ties)} part at a near tie, of at most {max(tuned.ties):.3f} nats"
    if gaps := [gap for gap in tuned.gaps if gap != float("inf")]:
        yield f"{'':13}what it took instead is up to {max(gaps):.2f} nats less likely"
    nearest = plain if kind == "base" else tuned
    if nearest.delta is not None:
        whose = "the base's" if kind == "base" else "those of training"
        yield f"{'':13}log-probabilities differ from {whose} by {nearest.delta:.5f} nats on average"
    if tuned.effect is not None:
        yield f"{'':13}of what the adapter changes, {round(tuned.effect, 2) + 0:.0%} is there"
    if any(extra):
        yield f"{'':13}its prompts have {_span(extra)} tokens more than in training, as it counts them"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _quoted(answer: Answer) -> str:
    return f"{answer.text.strip()[:SHOWN]!r}" + (" (stop)" if answer.ends is not None else " (length)")
