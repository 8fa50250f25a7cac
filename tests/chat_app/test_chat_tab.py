"""chat_tab.py without a browser: which visitor still waits for a reply."""

import threading
from types import SimpleNamespace

import gradio
import pytest

from chat_app import conversation
from chat_app.chat_tab import ChatTab
from chat_app.engine import ChatEngine, Reply

SETTINGS = ("", 0.0, 0.9, 24, False, 1)  # system prompt, temperature, top-p, max new tokens, thinking, candidates
LONG = ("", 1.0, 1.0, 1500, False, 1)
UNCHANGED = [gradio.skip()] * 3
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


@pytest.fixture
def hints(monkeypatch):
    """The texts of the hints that the page shows."""
    shown = []
    monkeypatch.setattr(gradio, "Warning", lambda text, title: shown.append(text))
    return shown


def leave(tab, chat, how, visitor):
    if how == "stop":
        return tab.stop(chat, visitor)
    if how == "leave":
        return threading.Thread(target=tab.leave, args=[None, visitor]).start()  # waits for the reply's end
    return tab.forget(visitor)


@pytest.mark.parametrize("how", ["stop", "leave", "forget"])
def test_a_reply_that_is_no_longer_wanted_is_neither_started_nor_continued(tab, asked, how):
    leave(tab, asked, how, ME)
    assert list(tab.reply(asked, ME, *SETTINGS)) == [UNCHANGED]
    again = tab.ask(conversation.new(), "And now?", ME, *SETTINGS)[0]
    reply = tab.reply(again, ME, *LONG)
    written = next(reply)[0]["messages"][-1]
    assert written["role"] == "assistant"
    leave(tab, again, how, ME)
    (last,) = list(reply)  # what was written until then, marked as stopped
    message = last[0]["messages"][-1]
    assert last[0]["is_busy"] is False and message["ending"] == "stopped"
    assert message["content"].startswith(written["content"])


def test_who_leaves_waits_until_the_partial_reply_is_on_its_way(tab, asked):
    reply = tab.reply(asked, ME, *LONG)
    next(reply)
    leaving = threading.Thread(target=tab.leave, args=[None, ME])
    leaving.start()
    assert next(reply)[0]["is_busy"] is False and leaving.is_alive()
    assert list(reply) == []
    leaving.join(10)
    assert not leaving.is_alive()


def test_a_reply_stopped_while_it_waits_for_its_turn_ends_at_once_and_the_next_one_is_written(tab, asked):
    stopped = tab.stop(asked, ME)[0]
    assert stopped["messages"][-1] == {"role": "note", "content": "stopped before the first word"}
    again = tab.ask(stopped, "And now?", ME, *SETTINGS)[0]
    first = list(tab.reply(again, ME, *SETTINGS))  # the request of the stopped one, which comes to its turn now
    assert first[-1][0]["messages"][-1]["role"] == "assistant"
    assert list(tab.reply(first[-1][0], ME, *SETTINGS)) == [UNCHANGED]


@pytest.mark.parametrize("when", ["before its turn", "before the first word"])
def test_a_retry_stopped_before_the_first_word_keeps_the_reply(tab, asked, when, monkeypatch):
    chat = list(tab.reply(asked, ME, *SETTINGS))[-1][0]
    retrying = tab.retry(chat, ME, *SETTINGS)[0]
    if when == "before its turn":
        last = tab.stop(retrying, ME)[0]
    else:
        monkeypatch.setattr(tab.engine, "generate", lambda *rest, stop: iter([[Reply("", "", "stopped")]]))
        last = list(tab.reply(retrying, ME, *SETTINGS))[-1][0]
    assert last == chat


def test_a_retry_that_fails_keeps_the_reply(tab, asked, hints, monkeypatch):
    chat = list(tab.reply(asked, ME, *SETTINGS))[-1][0]
    retrying = tab.retry(chat, ME, *SETTINGS)[0]

    def fail(*rest, stop):
        raise RuntimeError("the GPU is gone")
        yield

    monkeypatch.setattr(tab.engine, "generate", fail)
    assert list(tab.reply(retrying, ME, *SETTINGS))[-1][0] == chat
    assert hints == ["RuntimeError: the GPU is gone"]


def test_what_cannot_be_done_now_is_a_hint_and_changes_nothing(tab, asked, hints):
    for refused in (
        tab.undo(asked, ""),
        tab.pick(asked, SimpleNamespace(value="1")),
        tab.ask(asked, "And now?", ME, *SETTINGS),
        tab.retry(asked, ME, *SETTINGS),
    ):
        assert refused == UNCHANGED
    assert hints == ["a reply is being written: stop it first, or wait"] * 4
    state, messages, box = tab.ask(conversation.EMPTY, " ", ME, *SETTINGS)
    assert (state, messages, box) == (gradio.skip(), [], gradio.skip()) and hints[-1] == "the message is empty"


def test_a_question_asked_before_the_page_has_opened_stays(tab):
    saved = conversation.answer(conversation.ask(conversation.new(), "Old"), [("Reply", "")])
    listed = {"chats": [["Old", saved["id"]]], "deleted": ""}
    stranger = SimpleNamespace(session_hash="stranger")
    assert tab.open_first([listed, saved], conversation.EMPTY, stranger)[0]["messages"] == saved["messages"]
    early = SimpleNamespace(session_hash="early")
    asked = tab.ask(conversation.EMPTY, "Hello!", early, *SETTINGS)[0]
    shown = tab.open_first([listed, saved], asked, early)
    assert shown[:4] == [gradio.skip()] * 4 and shown[4].choices == [("Old", saved["id"])]


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
