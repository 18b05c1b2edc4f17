"""How the page looks: Gradio's theme in the colours of hay and stone, the system's fonts, and a style sheet."""

import gradio as gr

from lora_alpaca.inference.page.views import asset

THEME = gr.themes.Default(
    primary_hue="amber",
    neutral_hue="stone",
    font=("system-ui", "sans-serif"),
    font_mono=("ui-monospace", "monospace"),
).set(  # the theme's own greys and ambers are too light to read
    color_accent="*primary_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    checkbox_background_color_selected="*primary_700",
    checkbox_border_color_selected="*primary_700",
    block_info_text_color="*neutral_500",
    block_info_text_color_dark="*neutral_400",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
)
CSS = asset("page.css")
