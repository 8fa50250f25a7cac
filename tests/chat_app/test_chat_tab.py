"""page_chat.py without a browser: whose reply is still wanted."""

from types import SimpleNamespace

import gradio
import pytest

from chat_app import conversation
from chat_app.chat_tab import ChatTab
from chat_app.engine import ChatEngine

VALUES = ("", 0.0, 0.9, 24, False, 1)  # system prompt, temperature, top-p, length, thinking, candidates
MINE, OTHERS = SimpleNamespace(session_hash="mine"), SimpleNamespace(session_hash="somebody else's")


@pytest.fixture
def chat(base):
    chat_engine = ChatEngine(base)
    chat_engine.load()
    with gradio.Blocks() as page:
        return ChatTab(chat_engine, page)


@pytest.fixture
def said(chat):
    """The conversation after a message was sent, when its page is about to ask for the reply."""
    return chat.say(conversation.new(), "Hello!", MINE, *VALUES)[0]


def leave(chat, said, how, whose):
    if how == "stop":
        chat.stop(said, whose)
    elif how == "new chat":
        chat.begin("", whose)
    else:
        chat.open(None, None, whose)


@pytest.mark.parametrize("how", ["stop", "new chat", "another chat"])
def test_a_reply_that_nobody_wants_any_more_is_not_begun_and_not_gone_on_with(chat, said, how):
    leave(chat, said, how, MINE)
    assert list(chat.reply(said, MINE, *VALUES)) == []
    again = chat.say(conversation.new(), "And now?", MINE, *VALUES)[0]
    written = chat.reply(again, MINE, *VALUES)
    assert next(written)[0]["messages"][-1]["role"] == "assistant"
    leave(chat, again, how, MINE)
    assert list(written) == []


def test_what_another_visitor_stops_is_another_reply(chat, said):
    written = chat.reply(said, MINE, *VALUES)
    next(written)
    chat.stop(said, OTHERS)
    assert list(written)[-1][0]["is_busy"] is False
