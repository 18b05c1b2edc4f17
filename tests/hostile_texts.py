"""Texts that would be more than text where somebody forgot that rows say anything, and the elements of a page."""

from html.parser import HTMLParser

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>", "</title><script>alert(1)</script>", "</style><style>*{display:none}</style>",
    "<!-- ", "--> <b>", "]]><b>", "<a href=javascript:alert(1)>x</a>", "&lt;script&gt;", "&#x3C;b&#x3E;",
    "\" onclick=\"x",
    "' onclick='x", "<iframe srcdoc='<script>'>", "<base href=//evil>", "<meta http-equiv=refresh content=0>",
    "</td></tr></table><h1>", "</pre><b>", "```\n<b>\n```", "~~~\n# x", "[x](javascript:alert(1))",
    "![x](http://x/y.png)",
    "| a | b |", "# heading", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\u202eevil\u2066", "\ud800 half",
    "a\x00b\x9bc",
]  # fmt: skip


class Elements(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts = set(), set(), []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)
