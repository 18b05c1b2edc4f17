"""The page of an evaluation: it loads nothing, shows texts as texts, and its controls do what they say."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from short_run import adapter as trained

from lora_alpaca.config import EvaluateConfig
from lora_alpaca.evaluation.evaluating import evaluate

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & <b>bold</b>"


@pytest.fixture(scope="module")
def page(tiny_llama: Path, rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of an evaluation of rows with markup in them."""
    folder = tmp_path_factory.mktemp("page")
    adapter = trained(folder, tiny_llama, rows, max_steps=2)
    path = folder / "asked.jsonl"
    asked = [{"instruction": HOSTILE, "output": HOSTILE}, {"instruction": "<!-- <script ", "output": "</script "}] + [
        {"instruction": f"Say {number}.", "output": str(number)} for number in range(29)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = {"lora_weights": str(adapter), "data_path": str(path), "output_dir": str(folder / "out")}
    evaluate(EvaluateConfig(**options, max_new_tokens=4, dtype="fp32", device="cpu"))
    return folder / "out" / "index.html"


def test_the_page_has_its_data_in_it_and_loads_nothing(page: Path) -> None:
    text = page.read_text()
    without_data = re.sub(r'(type="application/json">).*', r"\1", text)
    assert re.findall(r"(?:src|href)\s*=|https?:|url\(|@import|fetch\(", without_data) == []
    assert text.count("</script") == 2 and text.count("<!--") == 1  # those of the page
    found = re.search(r'type="application/json">(.*)</script>', text)
    assert found is not None
    data = json.loads(found[1])
    assert data["names"] == ["base", "adapter"] and len(data["rows"]) == 31
    assert data["rows"][0]["prompt"] == data["rows"][0]["expected"] == HOSTILE
    assert [score["called"] for score in data["scores"]][:3] == ["loss", "exact match", "ROUGE-L"]


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
def test_a_browser_shows_the_rows_as_text(page: Path, tmp_path: Path) -> None:
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>Evaluation</title>" in done.stdout
    assert done.stdout.count("<article") == 25 and "Show more (6 left)" in done.stdout
    assert "&lt;img src=x onerror=" in done.stdout and "<img" not in done.stdout.split("<main")[1].split("</main>")[0]
    assert "<td>loss</td>" in done.stdout


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
@pytest.mark.parametrize(
    ("control", "value", "numbers"),
    [
        ("search", "say 17", [18]),
        ("filter", "exact match of adapter only", [3]),
        ("filter", "adapter is worse by ROUGE-L", [4]),
        ("filter", "not at its end", [5]),
        ("filter", "repeats itself", [6]),
        ("filter", "not answered", [1]),
        ("sort", "gain in ROUGE-L, best first", [3, 2, 5]),
        ("sort", "gain in ROUGE-L, worst first", [4, 2, 5]),
        ("sort", "loss of adapter, highest first", [8, 2, 3]),
        ("sort", "length of adapter, longest first", [9, 2, 3]),
    ],
)
def test_the_controls_of_the_page(page: Path, tmp_path: Path, control: str, value: str, numbers: list[int]) -> None:
    """The data is replaced by rows of which each is alone in one respect; the first three that are shown count."""
    model = {"answer": "a", "error": "", "loss": 1.0, "exact": False, "rouge": 0.5, "stopped": 1.0, "tokens": 3}
    data = [
        {"row": row, "where": "", "prompt": f"Say {row - 1}.", "expected": "b", "models": [dict(model), dict(model)]}
        for row in range(1, 31)
    ]
    for row in data:
        for found in row["models"]:
            found["repetition"] = 0.0
    changes = {
        3: {"exact": True, "rouge": 1.0}, 4: {"rouge": 0.2}, 5: {"stopped": 0.0}, 6: {"repetition": 0.1},
        1: {"error": "too long", "rouge": None, "loss": None, "tokens": None, "repetition": None},
        8: {"loss": 2.0}, 9: {"tokens": 8},
    }  # fmt: skip
    for number, change in changes.items():
        data[number - 1]["models"][1] |= change
    text = page.read_text()
    whole = {"names": ["base", "adapter"], "what": "", "scores": [], "rows": data}
    start = text.index('type="application/json">') + len('type="application/json">')
    text = text[:start] + json.dumps(whole) + text[text.index("</script>", start) :]
    chosen = "[...control.options].find((one) => one.text === value).value" if control != "search" else "value"
    text = text.replace(
        "</html>",
        f"""<script>{{ const control = document.getElementById({control!r}), value = {value!r};
        control.value = {chosen}; control.dispatchEvent(new Event("input")); }}</script></html>""",
    )
    changed = tmp_path / "page.html"
    changed.write_text(text)
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    shown = subprocess.run([*words, changed.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = [int(number) for number in re.findall(r"<span>row (\d+)</span>", shown)]
    assert found[:3] == numbers, shown[-3000:]
