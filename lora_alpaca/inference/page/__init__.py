"""The web page: a chat, upstream's form, and base and finetuned side by side.

`launch` serves what `layout` puts together of `chat_tab`, `form_tab`, `compare_tab` and the `settings` that they share.
Each tab asks by `asking`, which reads answers in threads of their own, and shows them in `views`, whose scripts set
text as text: nothing that a model or a visitor writes is ever read as HTML or Markdown.

Nothing on the page comes from elsewhere: system fonts, no analytics, no flagging, and it listens on this machine alone
unless it is told otherwise.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
