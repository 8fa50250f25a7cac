"""What the tabs share: options of Gradio's events, and errors as the visitor sees them."""

import contextlib
import html
from collections.abc import Iterator

import gradio as gr

from chat_app.engine import ChatEngine

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE = {**QUIET, "concurrency_limit": None}  # not queue=False: errors of such events never reach the visitor
# All generation shares one queue: a model serves one visitor at a time, and the others see their places.
GENERATION = {"concurrency_id": "generation", "concurrency_limit": 1, "api_visibility": "private"}


@contextlib.contextmanager
def errors_shown(engine: ChatEngine, as_html: bool = True) -> Iterator[None]:
    """Turn any error into one that Gradio shows to the visitor; programs that call the API get plain text."""
    try:
        yield
    except Exception as error:  # otherwise the visitor would wait without knowing why
        text = engine.explain(error)
        raise gr.Error(html.escape(text) if as_html else text, print_exception=False) from error
