"""conversation.py: what was said, how it changes, and how it is shown."""

import json

import pytest

from chat_app import conversation as talk

HOSTILE = "<script>alert(1)</script> & **bold**\n    indented"


def say(*texts):
    """A conversation of turns: question, reply, question, …"""
    kept = talk.new("be brief")
    for number, text in enumerate(texts):
        kept = talk.answer(kept, [(text, "")]) if number % 2 else talk.say(kept, text)
    return kept


def contents(kept):
    return [message["content"] for message in kept["messages"]]


def texts_of(messages):
    return [[block["text"] for block in message["content"]] for message in messages]


def test_a_dialogue_holds_no_notes_and_no_message_that_was_never_answered():
    kept = talk.note(talk.say(say("a", "b"), "far too long"), "too long")
    kept = talk.say(kept, "c")
    assert talk.dialogue(kept) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]


def test_each_reply_is_scored_with_what_came_before_it():
    dialogues = talk.dialogues_to_score(say("a", "b", "c", "d"))
    assert [[message["content"] for message in dialogue] for dialogue in dialogues] == [
        ["a", "b"],
        ["a", "b", "c", "d"],
    ]


def test_undo_gives_the_last_question_back_and_is_harmless_at_the_start():
    assert talk.undo(say("a", "b", "c", "d"))[1] == "c" and contents(talk.undo(say("a", "b", "c", "d"))[0]) == [
        "a",
        "b",
    ]
    assert contents(talk.undo(talk.note(say("a"), "why"))[0]) == []
    assert talk.undo(talk.new())[1] == ""


def test_retrying_keeps_the_question_and_drops_the_reply():
    assert contents(talk.before_last_reply(say("a", "b", "c", "d"))) == ["a", "b", "c"]


def test_editing_a_question_drops_what_followed_it():
    assert contents(talk.edit(say("a", "b", "c", "d"), 0, "z")) == ["z"]
    assert contents(talk.edit(say("a", "b", "c", "d"), 2, "z")) == ["a", "b", "z"]


def test_picking_a_candidate_swaps_it_with_the_one_shown():
    kept = talk.answer(say("a"), [("best", "t1"), ("second", "t2"), ("third", "t3")])
    picked = talk.pick(kept, 1)["messages"][-1]
    assert (picked["content"], picked["thinking"]) == ("third", "t3")
    assert [other["content"] for other in picked["others"]] == ["second", "best"]
    assert talk.pick(talk.pick(kept, 1), 1) == kept


def test_changes_leave_the_conversation_before_them_as_it_was():
    kept = say("a", "b")
    before = json.dumps(kept)
    talk.say(kept, "c"), talk.note(kept, "n"), talk.undo(kept), talk.edit(kept, 0, "z"), talk.answer(kept, [("x", "")])
    assert json.dumps(kept) == before


def test_what_was_written_is_escaped_wherever_it_is_shown():
    kept = talk.answer(talk.say(talk.new(), HOSTILE), [(HOSTILE, HOSTILE)])
    messages, indices = talk.shown(talk.note(kept, HOSTILE), [HOSTILE])
    assert indices == [0, 1, 1, 2]
    texts = [text for blocks in texts_of(messages) for text in blocks]
    assert len(texts) == 5 and not any("<script" in text for text in texts)
    assert texts[0] == "&lt;script&gt;alert(1)&lt;/script&gt; &amp; **bold**\n    indented"
    assert texts[3].startswith('<small class="footer">&lt;script')


def test_thinking_stands_before_the_reply_and_is_pending_while_there_is_none():
    thinking = talk.answer(say("a"), [("", "hmm")])
    assert talk.shown(thinking, [])[0][1]["metadata"] == {"title": "Thinking", "status": "pending"}
    done = talk.answer(say("a"), [("b", "hmm")])
    assert talk.shown(done, [])[0][1]["metadata"] == {"title": "Thinking", "status": "done"}


def test_candidates_stand_under_the_last_reply_only():
    kept = talk.say(talk.answer(say("a"), [("b", ""), ("c", "")]), "d")
    assert not any(message.get("options") for message in talk.shown(kept, [], [("c", 0)])[0])
    messages, _ = talk.shown(talk.answer(kept, [("e", ""), ("f", "")]), [], [("f", 0)])
    assert [message.get("options") for message in messages if message["role"] == "assistant"] == [
        [],
        [{"label": "f", "value": "0"}],
    ]


def test_rewards_are_ranked_within_the_conversation_and_equals_share_a_rank():
    assert talk.reward_footers([0.5]) == ["reward +0.500"]
    assert talk.reward_footers([-1.0, 2.0, -1.0]) == [
        "reward -1.000 · 2nd of this chat's 3 replies",
        "reward +2.000 · 1st of this chat's 3 replies",
        "reward -1.000 · 2nd of this chat's 3 replies",
    ]


@pytest.mark.parametrize("number, text", [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"),
                                          (21, "21st"), (111, "111th")])  # fmt: skip
def test_ordinals(number, text):
    assert talk.ordinal(number) == text


def test_labels_of_candidates_have_rank_reward_and_first_words():
    labels = talk.candidate_options(["shown", "one\n two", "x" * 99], [0.2, 0.9, 0.1])
    assert labels == [("1st of 3, +0.900: one two", 0), ("3rd of 3, +0.100: " + "x" * 59 + "…", 1)]
    assert talk.candidate_options(["shown", "other"], None) == [("other", 0)]


def test_titles_are_the_first_question_shortened():
    assert talk.title(say("  what\n is ", "b")) == "what is" and talk.title(talk.new()) == "empty"
    assert len(talk.title(say("word " * 50))) == 48


def test_a_kept_conversation_comes_back_and_anything_else_becomes_a_new_one():
    kept = talk.note(talk.answer(say("a"), [("b", "t"), ("c", "")]), "n")
    assert talk.checked(json.loads(json.dumps(kept))) == kept
    for junk in (None, 3, [], {}, {"id": 1}, {**kept, "messages": [{"role": "king", "content": "x"}]},
                 {**kept, "messages": [{"role": "user", "content": [1]}]}, {**kept, "messages": 7}):  # fmt: skip
        assert talk.checked(junk)["messages"] == []
