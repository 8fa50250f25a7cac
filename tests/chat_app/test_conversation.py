"""conversation.py: what was said, how it changes, and how it is shown."""

import json

import pytest

from chat_app import conversation

HOSTILE = "<script>alert(1)</script> & **bold**\n    indented"


def conversation_of(*texts):
    """A conversation of turns: question, reply, question, …"""
    chat = conversation.new("be brief")
    for number, text in enumerate(texts):
        chat = conversation.answer(chat, [(text, "")]) if number % 2 else conversation.ask(chat, text)
    return chat


def contents(chat):
    return [message["content"] for message in chat["messages"]]


def texts_of(messages):
    return [[block["text"] for block in message["content"]] for message in messages]


def test_a_dialogue_holds_no_notes_and_no_message_that_was_never_answered():
    chat = conversation.note(conversation.ask(conversation_of("a", "b"), "far too long"), "too long")
    chat = conversation.ask(chat, "c")
    assert conversation.dialogue(chat) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]


def test_each_reply_is_scored_with_what_came_before_it():
    dialogues = conversation.dialogues_to_score(conversation_of("a", "b", "c", "d"))
    assert [[message["content"] for message in dialogue] for dialogue in dialogues] == [
        ["a", "b"],
        ["a", "b", "c", "d"],
    ]


def test_undo_gives_the_last_question_back_and_is_harmless_at_the_start():
    earlier, question = conversation.undo(conversation_of("a", "b", "c", "d"))
    assert question == "c" and contents(earlier) == ["a", "b"]
    assert contents(conversation.undo(conversation.note(conversation_of("a"), "why"))[0]) == []
    assert conversation.undo(conversation.new())[1] == ""


def test_retrying_keeps_the_question_and_drops_the_reply():
    assert contents(conversation.before_last_reply(conversation_of("a", "b", "c", "d"))) == ["a", "b", "c"]


def test_editing_a_question_drops_what_followed_it():
    assert contents(conversation.edit(conversation_of("a", "b", "c", "d"), 0, "z")) == ["z"]
    assert contents(conversation.edit(conversation_of("a", "b", "c", "d"), 2, "z")) == ["a", "b", "z"]


def test_picking_a_candidate_swaps_it_with_the_one_shown():
    chat = conversation.answer(conversation_of("a"), [("best", "t1"), ("second", "t2"), ("third", "t3")])
    picked = conversation.pick(chat, 1)["messages"][-1]
    assert (picked["content"], picked["thinking"]) == ("third", "t3")
    assert [other["content"] for other in picked["others"]] == ["second", "best"]
    assert conversation.pick(conversation.pick(chat, 1), 1) == chat


def test_changes_leave_the_conversation_before_them_as_it_was():
    chat = conversation_of("a", "b")
    before = json.dumps(chat)
    (
        conversation.ask(chat, "c"),
        conversation.note(chat, "n"),
        conversation.undo(chat),
        conversation.edit(chat, 0, "z"),
        conversation.answer(chat, [("x", "")]),
    )
    assert json.dumps(chat) == before


def test_what_was_written_is_escaped_wherever_it_is_shown():
    chat = conversation.answer(conversation.ask(conversation.new(), HOSTILE), [(HOSTILE, HOSTILE)])
    messages, indices = conversation.to_chatbot(conversation.note(chat, HOSTILE), [HOSTILE])
    assert indices == [0, 1, 1, 2]
    texts = [text for blocks in texts_of(messages) for text in blocks]
    assert len(texts) == 5 and not any("<script" in text for text in texts)
    assert texts[0] == "&lt;script&gt;alert(1)&lt;/script&gt; &amp; **bold**\n    indented"
    assert texts[3].startswith('<small class="footer">&lt;script')


def test_thinking_stands_before_the_reply_and_is_pending_while_there_is_none():
    thinking = conversation.answer(conversation_of("a"), [("", "hmm")])
    assert conversation.to_chatbot(thinking, [])[0][1]["metadata"] == {"title": "Thinking", "status": "pending"}
    done = conversation.answer(conversation_of("a"), [("b", "hmm")])
    assert conversation.to_chatbot(done, [])[0][1]["metadata"] == {"title": "Thinking", "status": "done"}


def test_candidates_stand_under_the_last_reply_only():
    chat = conversation.ask(conversation.answer(conversation_of("a"), [("b", ""), ("c", "")]), "d")
    assert not any(message.get("options") for message in conversation.to_chatbot(chat, [], [("c", 0)])[0])
    messages, _ = conversation.to_chatbot(conversation.answer(chat, [("e", ""), ("f", "")]), [], [("f", 0)])
    assert [message.get("options") for message in messages if message["role"] == "assistant"] == [
        [],
        [{"label": "f", "value": "0"}],
    ]


def test_rewards_are_ranked_within_the_conversation_and_equals_share_a_rank():
    assert conversation.reward_footers([0.5]) == ["reward +0.500"]
    assert conversation.reward_footers([-1.0, 2.0, -1.0]) == [
        "reward -1.000 · 2nd of this chat's 3 replies",
        "reward +2.000 · 1st of this chat's 3 replies",
        "reward -1.000 · 2nd of this chat's 3 replies",
    ]


@pytest.mark.parametrize("number, text", [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"),
                                          (21, "21st"), (111, "111th")])  # fmt: skip
def test_ordinals(number, text):
    assert conversation.ordinal(number) == text


def test_labels_of_candidates_have_rank_reward_and_first_words():
    labels = conversation.candidate_options(["shown", "one\n two", "x" * 99], [0.2, 0.9, 0.1])
    assert labels == [("1st of 3, +0.900: one two", 0), ("3rd of 3, +0.100: " + "x" * 59 + "…", 1)]
    assert conversation.candidate_options(["shown", "other"], None) == [("other", 0)]


def test_titles_are_the_first_question_shortened():
    assert conversation.title(conversation_of("  what\n is ", "b")) == "what is"
    assert conversation.title(conversation.new()) == ""
    assert len(conversation.title(conversation_of("word " * 50))) == 48


def test_a_kept_conversation_comes_back_and_anything_else_becomes_a_new_one():
    chat = conversation.note(conversation.answer(conversation_of("a"), [("b", "t"), ("c", "")]), "n")
    assert conversation.checked(json.loads(json.dumps(chat))) == chat
    for junk in (None, 3, [], {}, {"id": 1}, {**chat, "messages": [{"role": "king", "content": "x"}]},
                 {**chat, "messages": [{"role": "user", "content": [1]}]}, {**chat, "messages": 7}):  # fmt: skip
        assert conversation.checked(junk)["messages"] == []
