"""What the library's web pages share: their look in light and dark, and how a text becomes text on one."""

import html
import json
from typing import Any

from lora_alpaca.errors import visible

STYLE = """
  :root {
    color-scheme: light dark;
    --page: #faf9f7; --card: #fff; --text: #1c1917; --soft: #57534e; --line: #e0dcd6;
    --mark: #fde8c4; --good: #166534; --bad: #b42318; --accent: #92400e; --second: #0f5e8c;
  }
  @media (prefers-color-scheme: dark) {
    :root {
      --page: #1a1816; --card: #24211e; --text: #f0ece6; --soft: #b3aba1; --line: #3d3833;
      --mark: #5c4212; --good: #6fcf8e; --bad: #ff8f80; --accent: #f3b562; --second: #7cc4f0;
    }
  }
  * { box-sizing: border-box; }
  body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--page); color: var(--text);
         font: 15px/1.5 system-ui, sans-serif; }
  h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
  p { color: var(--soft); margin: 4px 0 16px; overflow-wrap: anywhere; }
  table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line); }
  th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
           font-variant-numeric: tabular-nums; }
  th:first-child, td:first-child { text-align: left; }
  thead th { color: var(--soft); font-weight: 600; }
  td small { color: var(--soft); }
  article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
            margin: 0 0 14px; }
  article header { display: flex; gap: 12px; color: var(--soft); font-size: 0.85rem; }
  article header .where { margin-left: auto; overflow-wrap: anywhere; }
  .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 0; max-height: 22em; overflow-y: auto; }
  .prompt { font-weight: 600; }
  .columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 14px;
             margin-top: 12px; }
  .columns section { border-top: 2px solid var(--line); padding-top: 8px; min-width: 0; }
  .facts { color: var(--soft); font-size: 0.8rem; margin: 8px 0 0; }
  @media (max-width: 640px) {
    body { padding: 16px 14px 40px; }
    th, td { padding: 6px 7px; white-space: normal; font-size: 0.92rem; }
    td small { display: block; }
  }
"""


def as_text(text: str) -> str:
    """Return a text as HTML in which all of it is text, its control characters written out."""
    return html.escape(visible(text))


def as_data(value: Any) -> str:
    """Return a value as JSON that nothing in it can leave, for a script element of a page."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
