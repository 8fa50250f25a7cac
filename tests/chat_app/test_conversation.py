"""conversation.py: what was said, how it changes, and how it is shown."""

import json
import re

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


def test_picking_a_version_shows_it_and_numbers_stay_with_their_texts():
    chat = conversation.answer(conversation_of("a"), [("best", "t1"), ("second", "t2"), ("third", "t3", "cut")])
    picked = conversation.pick(chat, 3)
    last = picked["messages"][-1]
    assert (last["content"], last["thinking"], last["ending"], last["number"]) == ("third", "t3", "cut", 3)
    assert [(other["content"], other["number"]) for other in last["others"]] == [("best", 1), ("second", 2)]
    assert conversation.pick(conversation.pick(picked, 1), 1) == conversation.pick(picked, 1) == chat


def test_a_retry_keeps_what_it_replaces_as_versions():
    chat = conversation.answer(conversation_of("a"), [("b", ""), ("c", "")])
    retried = conversation.retry(chat)
    assert contents(retried) == ["a"]
    last = conversation.answer(retried, [("d", "", "stopped")])["messages"][-1]
    assert [(version["content"], version["number"]) for version in conversation.versions_of(last)] == [
        ("d", 3), ("b", 1), ("c", 2)]  # fmt: skip


def test_a_retry_that_writes_nothing_leaves_the_earlier_reply():
    chat = conversation.answer(conversation_of("a"), [("b", ""), ("c", "")])
    assert conversation.settled({**conversation.retry(chat), "is_busy": True}) == chat
    # also after the page was closed in the middle
    assert conversation.checked(json.loads(json.dumps(conversation.retry(chat)))) == chat
    assert contents(conversation.settled(conversation.retry(conversation.note(conversation_of("a"), "why")))) == ["a"]


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


def test_only_replies_are_markdown_and_nothing_brings_html():
    chat = conversation.answer(conversation.ask(conversation.new(), HOSTILE), [(HOSTILE, HOSTILE)])
    messages, indices = conversation.to_chatbot(conversation.note(chat, HOSTILE), [HOSTILE])
    assert indices == [0, 1, 1, 2]
    texts = [text for blocks in texts_of(messages) for text in blocks]
    assert len(texts) == 5 and not any("<script" in text for text in texts)
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; **bold**\n    indented"
    assert texts[0] == texts[1] == texts[4] == f'<pre class="raw">\n{escaped}</pre>'
    assert texts[2].replace("\ufdd0", "") == HOSTILE and "**bold**" in texts[2]
    assert texts[3].startswith('<small class="footer">&lt;script')


@pytest.mark.parametrize(
    "text",
    ["<b>", "</pre>", "<!-- x -->", "<?php", "a&lt;b &#60; &copy", "![x](https://e.org/x.png)", "![x][y]",
     "```mermaid\na", "<$a$b>", "$$<img src=x>$$ <b>", r"\(a\) <b> \[b\]", "\ufdd0<b\ufdd1>", "a <\tb !\t[ &\t",
     "$$a <\tb$$"],
)  # fmt: skip
def test_marks_break_whatever_would_be_more_than_text_and_go_without_a_trace(text):
    marked = conversation.markdown(text)
    assert not re.search(r"<[A-Za-z/!?]|&[#A-Za-z]|!\[|```mermaid", marked)
    # as page_head.html takes them out
    plain = re.sub("[\ufdd1\ufdd2]", "$", re.sub("([<&!])\t|\ufdd0", r"\1", marked))
    assert plain == re.sub("[\ufdd0-\ufdd2]", "\ufffd", text)


@pytest.mark.parametrize(
    "text, formulas",
    [("so $x^2$ and $a$.", ["x^2", "a"]), ("from $5 to $6", []), ("$5$6", []), ("a $ b $ c", []), (r"\$x$", []),
     ("$HOME and PATH$", ["HOME and PATH"]), ("$$x$$", [])],
)  # fmt: skip
def test_dollars_are_formulas_but_prices_are_not(text, formulas):
    assert re.findall("\ufdd1(.*?)\ufdd2", conversation.markdown(text)) == formulas


def test_formulas_stay_as_they_were_written_but_for_white_space():
    for text in (r"\(a < b & c\)", r"$$\begin{a}1 & 2\end{a}$$", r"\[ $$x<y$$ \]"):
        assert conversation.markdown(text).replace("<\ty", "<y") == text


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


def test_a_reply_is_ranked_among_the_replies_to_its_prompt_only():
    assert conversation.footer([0.5]) == "reward +0.500"
    assert conversation.footer([1.0, 0.0, -3.0]) == (
        "reward +1.000 · 1st of 3 replies to this prompt · P(better than the runner-up) = 73%"
    )
    assert conversation.footer([-3.0, 1.0]).endswith("2nd of 2 replies to this prompt · P(better than the best) = 2%")
    assert conversation.footer([2.0, 2.0]).endswith(
        "1st of 2 replies to this prompt · P(better than the runner-up) = 50%"
    )


def test_a_reply_that_is_not_whole_says_so_with_or_without_a_reward():
    assert conversation.footer([0.5], below=0.83) == "reward +0.500 · higher than 83% of held-out replies"
    assert conversation.footer(None, below=0.83) == conversation.footer(None) == ""
    assert conversation.footer(None, "stopped") == "stopped early"
    assert conversation.footer([0.5], "cut") == "reward +0.500 · cut off at max new tokens"


@pytest.mark.parametrize("rewards, text", [([900.0, -900.0], "over 99%"), ([-900.0, 900.0], "under 1%")])
def test_no_probability_is_shown_as_certain(rewards, text):
    assert conversation.footer(rewards).endswith(f"= {text}")


@pytest.mark.parametrize("number, text", [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"),
                                          (21, "21st"), (111, "111th")])  # fmt: skip
def test_ordinals(number, text):
    assert conversation.ordinal(number) == text


def test_versions_stand_in_the_order_of_their_rewards_and_the_one_shown_has_its_place():
    versions = [
        {"content": "shown", "ending": "", "number": 2},
        {"content": "one\n two", "ending": "stopped", "number": 1},
        {"content": "x" * 99, "ending": "cut", "number": 3},
    ]
    assert conversation.version_options(versions, [0.2, 0.9, 0.1]) == [
        ("1st of 3, +0.900, stopped early: one two", 1),
        ("2nd of 3, +0.200, shown: shown", 2),
        ("3rd of 3, +0.100, cut off at max new tokens: " + "x" * 59 + "…", 3),
    ]
    assert [number for _, number in conversation.version_options(versions, None)] == [1, 2, 3]
    assert [number for _, number in conversation.version_options(versions, [1.0, 1.0, 1.0])] == [1, 2, 3]


def test_a_conversation_of_an_earlier_version_of_the_page_is_read():
    reply = {"role": "assistant", "content": "b", "thinking": "t", "others": [{"content": "c", "thinking": ""}]}
    old = {"id": "x", "system_prompt": "", "messages": [{"role": "user", "content": "a"}, reply]}
    versions = conversation.versions_of(conversation.checked(old)["messages"][-1])
    assert [(version["content"], version["ending"], version["number"]) for version in versions] == [
        ("b", "", 1), ("c", "", 2)]  # fmt: skip


def test_each_visitors_first_question_gives_the_conversation_an_id_of_its_own():
    first, second = (conversation.ask(conversation.EMPTY, "a") for _ in range(2))
    assert first["id"] and second["id"] and first["id"] != second["id"]
    assert conversation.ask(first, "b")["id"] == first["id"]


def test_an_export_has_a_line_for_each_reply_with_its_versions():
    chat = conversation.retry(conversation_of("a", "b", "c", "d"))
    chat = conversation.answer(chat, [("e", "", "stopped")])
    kept = [{"title": "A talk", "conversation": chat}, {"title": "damaged", "conversation": {"id": 3}}]
    rows = [json.loads(line) for line in conversation.export(kept).splitlines()]
    system = {"role": "system", "content": "be brief"}
    assert rows[0] == {
        "prompt": [system, {"role": "user", "content": "a"}], "endings": [""], "chat": "A talk",
        "replies": [[{"role": "assistant", "content": "b"}]],
    }  # fmt: skip
    assert [message["content"] for message in rows[1]["prompt"]] == ["be brief", "a", "b", "c"]
    assert [reply[0]["content"] for reply in rows[1]["replies"]] == ["e", "d"]
    assert rows[1]["endings"] == ["stopped", ""] and len(rows) == 2


def test_titles_are_the_first_question_shortened():
    assert conversation.title(conversation_of("  what\n is ", "b")) == "what is"
    assert conversation.title(conversation.new()) == ""
    assert len(conversation.title(conversation_of("word " * 50))) == 48


def test_a_kept_conversation_comes_back_and_anything_else_becomes_a_new_one():
    chat = conversation.note(conversation.answer(conversation_of("a"), [("b", "t"), ("c", "")]), "n")
    assert conversation.checked(json.loads(json.dumps(chat))) == chat
    for junk in (
        None, 3, [], {}, {"id": 1}, {**chat, "messages": 7}, {**chat, "versions": 3},
        {**chat, "messages": [{"role": "king", "content": "x"}]},
        {**chat, "messages": [{"role": "user", "content": [1]}]},
        {**chat, "messages": [{"role": "assistant", "content": "x", "others": [1]}]},
        {**chat, "versions": [{"content": "x", "ending": "odd"}]},
    ):  # fmt: skip
        assert conversation.checked(junk)["messages"] == []
