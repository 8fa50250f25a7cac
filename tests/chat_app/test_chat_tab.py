"""chat_tab.py without a browser: which visitor still waits for a reply."""

from types import SimpleNamespace

import gradio
import pytest

from chat_app import conversation
from chat_app.chat_tab import ChatTab
from chat_app.engine import ChatEngine

SETTINGS = ("", 0.0, 0.9, 24, False, 1)  # system prompt, temperature, top-p, max new tokens, thinking, candidates
ME, OTHER = SimpleNamespace(session_hash="me"), SimpleNamespace(session_hash="another visitor")


@pytest.fixture(scope="module")
def tab(base):
    engine = ChatEngine(base)
    engine.load()
    with gradio.Blocks() as page:
        return ChatTab(engine, page)


@pytest.fixture
def asked(tab):
    """The conversation after a message was sent, before the page requests the reply."""
    return tab.ask(conversation.new(), "Hello!", ME, *SETTINGS)[0]


def leave(tab, chat, how, visitor):
    if how == "stop":
        tab.stop(chat, visitor)
    elif how == "new chat":
        tab.new_chat("", visitor)
    else:
        tab.open(None, None, visitor)


@pytest.mark.parametrize("how", ["stop", "new chat", "another chat"])
def test_a_reply_that_is_no_longer_wanted_is_neither_started_nor_continued(tab, asked, how):
    leave(tab, asked, how, ME)
    assert list(tab.reply(asked, ME, *SETTINGS)) == []
    again = tab.ask(conversation.new(), "And now?", ME, *SETTINGS)[0]
    reply = tab.reply(again, ME, *SETTINGS)
    assert next(reply)[0]["messages"][-1]["role"] == "assistant"
    leave(tab, again, how, ME)
    assert list(reply) == []


def test_stopping_a_reply_stops_no_other_visitors_reply(tab, asked):
    reply = tab.reply(asked, ME, *SETTINGS)
    next(reply)
    tab.stop(asked, OTHER)
    assert list(reply)[-1][0]["is_busy"] is False


def test_the_note_about_several_replies_is_below_the_reply_being_written(tab, asked):
    chat = tab.ask(list(tab.reply(asked, ME, *SETTINGS))[-1][0], "And now?", ME, *SETTINGS)[0]
    messages = next(tab.reply(chat, ME, "", 1.0, 0.9, 24, False, 2))[1]
    notes = ["writing 2 replies" in str(message["content"]) for message in messages]
    assert notes == [False, False, False, True]
