"""shapes.py and messages.py: preference sets as they are published become the same dialogues."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import models
from data_pipeline import messages, parsing, shapes, tokenization
from data_pipeline.parsing import Pair
from tests.data_pipeline.rows import NO, PROMPT, QUESTION, YES, read_all
from utils import UserError

ASKED, GOOD, POOR = QUESTION["content"], YES["content"], NO["content"]
BRIEF = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "oven", "arguments": {"unit": "C"}}}
TOOLS = [{"type": "function", "function": {"name": "oven", "parameters": {"type": "object", "properties": {}}}}]

ROW_ERROR = parsing.row_errors("row {}".format, 1, "pairs")


def parsed(**row):
    return parsing.parse_row(row, ROW_ERROR)


SAME = {
    "a question": {"question": ASKED, "chosen": GOOD, "rejected": POOR},
    "an instruction": {"instruction": ASKED, "input": "", "chosen": GOOD, "rejected": POOR},
    "a query": {"query": ASKED, "chosen": GOOD, "rejected": POOR},
    "messages beside replies": {"messages": [QUESTION], "chosen": [YES], "rejected": [NO]},
    "messages beside texts": {"messages": [QUESTION], "chosen": GOOD, "rejected": POOR},
    "a side of one message": {"messages": [QUESTION], "chosen": YES, "rejected": NO},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": ASKED}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": POOR},
    },
    "an input": {"input": ASKED, "chosen": GOOD, "rejected": POOR},
    "a trajectory": {"trajectory": [{"from": "user", "value": ASKED}], "chosen": GOOD, "rejected": POOR},
    "chosen_response": {"instruction": ASKED, "chosen_response": GOOD, "rejected_response": POOR},
    "response_chosen": {"prompt": ASKED, "response_chosen": GOOD, "response_rejected": POOR},
    "preferred": {"prompt": ASKED, "preferred": [YES], "dispreferred": [NO]},
    "accepted": {"prompt": ASKED, "accepted": GOOD, "rejected": POOR},
    "HelpSteer2": {"prompt": ASKED, "response_1": POOR, "response_2": GOOD, "preference_strength": 2},
    "HelpSteer2, the other way round": {
        "prompt": ASKED, "response_1": GOOD, "response_2": POOR, "preference_strength": -1,
    },
    "summaries": {
        "info": {"post": ASKED, "id": "x"}, "summaries": [{"text": POOR}, {"text": GOOD}], "choice": 1,
    },
    "Stack Exchange": {
        "question": ASKED, "answers": [{"text": POOR, "pm_score": 0}, {"text": GOOD, "pm_score": 4}],
    },
    "other names of roles": {
        "chosen": [{"role": "Human", "content": ASKED}, {"role": "bot", "content": GOOD}],
        "rejected": [{"role": "USER", "content": ASKED}, {"role": "Model", "content": POOR}],
    },
    "parts of content": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": POOR, "image": None}]}],
    },
    "an empty prompt beside dialogues": {"prompt": "", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    "an unused prompt": {"prompt": [], "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    "a prompt that the sides repeat in other spacing": {
        "prompt": f"{ASKED}  ", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO],
    },
    "ChatML": {
        "prompt": f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n",
        "chosen": f"{GOOD}<|im_end|>\n", "rejected": f"{POOR}<|im_end|>",
    },
    "whole dialogues in ChatML": {
        "chosen": f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n{GOOD}<|im_end|>\n",
        "rejected": f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n{POOR}<|im_end|>\n",
    },
    "PKU-SafeRLHF": {"prompt": ASKED, "response_0": POOR, "response_1": GOOD, "better_response_id": 1},
    "HelpSteer3": {"context": [QUESTION], "response1": GOOD, "response2": POOR, "overall_preference": -3},
    "Chatbot Arena": {
        "winner": "model_b", "conversation_a": [QUESTION, NO], "conversation_b": [QUESTION, YES],
    },
    "SHP": {"history": ASKED, "human_ref_A": POOR, "human_ref_B": GOOD, "labels": 0, "score_A": 2, "score_B": 8},
    "WebGPT": {
        "question": {"full_text": ASKED}, "answer_0": GOOD, "answer_1": POOR, "score_0": 0.5, "score_1": -0.5,
    },
    "Nectar": {
        "prompt": f"{PROMPT} ", "answers": [{"answer": POOR, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}],
    },
    "UltraFeedback": {
        "instruction": ASKED,
        "completions": [{"response": POOR, "overall_score": 3.0}, {"response": GOOD, "overall_score": 8.5}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(SAME))
def test_a_published_form_becomes_the_same_pair(name):
    assert parsed(**SAME[name]) == [Pair([QUESTION, YES], [QUESTION, NO])]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "prompt": ASKED, "chosen": GOOD, "rejected": POOR},
        {"system_prompt": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": POOR},
        {"system": "Be brief.", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        {"system": "Be brief.", "chosen": [BRIEF, QUESTION, YES], "rejected": [BRIEF, QUESTION, NO]},
        {"prompt": [BRIEF, QUESTION], "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        {"prompt": [BRIEF], "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        {"prompt": [QUESTION], "chosen": [BRIEF, QUESTION, YES], "rejected": [BRIEF, QUESTION, NO]},
    ],
)
def test_a_system_text_is_the_first_turn_wherever_it_stands(row):
    assert parsed(**row) == [Pair([BRIEF, QUESTION, YES], [BRIEF, QUESTION, NO])]


def test_earlier_turns_in_the_prompt_go_in_front_of_sides_that_hold_the_last_one():
    earlier = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Yes?"}]
    (pair,) = parsed(prompt=earlier, chosen=[QUESTION, YES], rejected=[QUESTION, NO])
    assert pair == Pair([*earlier, QUESTION, YES], [*earlier, QUESTION, NO])
    assert parsed(prompt=[*earlier, QUESTION], chosen=[QUESTION, YES], rejected=[QUESTION, NO]) == [pair]


def test_an_instruction_and_its_input_are_one_question():
    (pair,) = parsed(instruction="Translate.", input="Guten Tag", chosen="Good day", rejected="Bye")
    assert pair.chosen[0] == {"role": "user", "content": "Translate.\n\nGuten Tag"}


TIES = [
    {"context": [QUESTION], "response1": GOOD, "response2": POOR, "overall_preference": 0},
    {"winner": "tie (bothbad)", "conversation_a": [QUESTION, NO], "conversation_b": [QUESTION, YES]},
    {"question": ASKED, "answer_0": GOOD, "answer_1": POOR, "score_0": 0.0, "score_1": 0.0},
    {"prompt": ASKED, "answers": [{"answer": POOR, "rank": 1.0}, {"answer": GOOD, "rank": 1.0}]},
]


def test_scores_as_text_are_compared_as_numbers():
    completions = [{"response": text, "overall_score": score} for text, score in (("A", "10"), ("B", "9"))]
    (pair,) = parsed(instruction=ASKED, completions=completions)
    assert (pair.chosen[-1]["content"], pair.rejected[-1]["content"]) == ("A", "B")


def test_tools_may_be_json_text_and_an_open_prompt_may_hold_nothing():
    (pair,) = parsed(prompt=ASKED, chosen=GOOD, rejected=POOR, tools=json.dumps(TOOLS))
    assert pair.tools == TOOLS
    (pair,) = parsed(prompt="\n\nAssistant:", chosen=[BRIEF, QUESTION, YES], rejected=[BRIEF, QUESTION, NO])
    assert pair == Pair([BRIEF, QUESTION, YES], [BRIEF, QUESTION, NO])


@pytest.mark.parametrize("row", TIES)
def test_a_tie_is_counted_as_no_preference(row):
    assert parsed(**row) == ["no_preference"]


def test_the_best_of_ranked_replies_is_chosen_over_each_worse_one(write_rows):
    answers = [{"answer": text, "rank": rank} for text, rank in (("C", 3), ("A", 1), ("B", 2), ("A too", 1))]
    read = read_all(write_rows([{"prompt": ASKED, "answers": answers}]))
    replies = [(number, pair.chosen[-1]["content"], pair.rejected[-1]["content"]) for number, pair in read]
    assert replies == [(1, "A", "B"), (1, "A", "C")]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": ASKED, "response_0": POOR, "response_1": GOOD, "better_response_id": 2}, "PKU-SafeRLHF"),
        ({"context": ASKED, "response1": POOR, "response2": GOOD, "overall_preference": "much"}, "HelpSteer3"),
        ({"winner": 1, "conversation_a": [QUESTION, NO], "conversation_b": [QUESTION, YES]}, "'winner' is 1"),
        ({"prompt": ASKED, "answers": [{"answer": "A"}, {"answer": "B"}]}, "Nectar.*rank"),
        ({"prompt": ASKED, "answers": []}, "Nectar.*not a list with replies"),
        ({"prompt": ASKED, "answers": [{"answer": "A", "rank": 1}, {"answer": "B", "rank": math.nan}]}, "not a finite"),
        ({"context": ASKED, "response1": POOR, "response2": GOOD, "overall_preference": math.nan}, "not a finite"),
        ({"history": ASKED, "human_ref_A": POOR, "human_ref_B": GOOD, "labels": 0.5}, "'labels' is 0.5, not 0 or 1"),
        ({"prompt": ASKED, "answers": ["A", "B"]}, "not a reply with 'answer' and 'rank'"),
        ({"prompt": ASKED, "answers": [{"answer": "A", "rank": 1}, {"answer": "B", "rank": None}]}, "'rank' is 'None'"),
        ({"prompt": ASKED, "response_0": 5, "response_1": GOOD, "better_response_id": 0}, "PKU-SafeRLHF.* a number"),
        ({"winner": "modelA", "conversation_a": [QUESTION, NO], "conversation_b": [QUESTION, YES]}, "not model_a"),
        ({"info": {"post": ASKED}, "summaries": [{"text": POOR}], "choice": 0}, "'summaries' holds 1, not two"),
        ({"winner": [1], "conversation_a": [QUESTION, NO], "conversation_b": [QUESTION, YES]}, "'winner' is"),
        ({"prompt": ASKED, "response_0": POOR, "response_1": GOOD, "better_response_id": math.inf}, "not 0 or 1"),
        ({"context": ASKED, "response1": POOR, "response2": GOOD, "overall_preference": 10**400}, "not a finite"),
        ({"prompt": "<|im_start|>cat\nHi<|im_end|>", "chosen": GOOD, "rejected": POOR}, "rendered already"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": POOR, "tools": 5}, "'tools' is not a list of objects"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": POOR, "tools": "oven"}, "'tools' is text that is not JSON"),
        (
            {"prompt": ASKED, "chosen": [{"role": "assistant", "content": "", "tool_calls": "x"}], "rejected": POOR},
            "tool_calls that are text",
        ),
        ({"prompt": "[INST] Hello [/INST]", "chosen": GOOD, "rejected": POOR}, r"rendered already.*\[INST\]"),
        ({"prompt": ASKED, "completion": GOOD, "label": True}, "no column 'chosen'; it has 'prompt', 'completion'"),
    ],
)
def test_what_cannot_be_read_is_named(row, reason):
    with pytest.raises(UserError, match=reason):
        parsed(**row)


# -- Messages with more than text --------------------------------------------------------------------------------------


def test_tool_calls_tools_and_reasoning_reach_the_chat_template():
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "name": "oven", "content": "200"}
    thinks = {**NO, "reasoning_content": "It has just been switched on."}
    (pair,) = parsed(prompt=[QUESTION], chosen=[calls, result, YES], rejected=[thinks], tools=TOOLS)
    assert pair.chosen == [QUESTION, {**calls, "content": ""}, result, YES]
    assert pair.rejected == [QUESTION, thinks] and pair.tools == TOOLS


def test_titles_inputs_and_messages_as_text_are_part_of_the_dialogue():
    def first(**row):
        (pair,) = parsed(**row, chosen=GOOD, rejected=POOR)
        return pair.chosen[0]["content"]

    assert first(prompt={"title": "Ovens", "post": ASKED}) == f"Ovens\n\n{ASKED}"
    assert first(instruction=ASKED, input=math.nan) == first(instruction=ASKED, input=" ") == ASKED
    assert parsed(instruction=[QUESTION], input="a list", chosen=GOOD, rejected=POOR)[0].unused == ("input",)
    for write in (json.dumps, repr):
        (pair,) = parsed(prompt=ASKED, chosen=write([QUESTION, YES]), rejected=write([NO]))
        assert pair == Pair([QUESTION, YES], [QUESTION, NO])
    with pytest.raises(UserError, match="lost its commas"):
        parsed(prompt=ASKED, chosen=f"[{YES}\n {NO}]", rejected=POOR)


def test_a_prompt_that_ends_in_one_of_the_replies_is_the_dialogue_before_it():
    for last in (YES, NO):
        for sides in ((GOOD, POOR), ([YES], [NO]), (YES, NO)):
            (pair,) = parsed(messages=[QUESTION, last], chosen=sides[0], rejected=sides[1])
            assert pair == Pair([QUESTION, YES], [QUESTION, NO])
    other = {"role": "assistant", "content": "Let me see."}
    (pair,) = parsed(messages=[QUESTION, other], chosen=GOOD, rejected=POOR)
    assert pair.chosen[-1]["content"] == f"Let me see.\n\n{GOOD}"


def test_a_prompt_that_is_null_is_named():
    assert parsed(prompt=None, chosen=GOOD, rejected=POOR) == ["null: 'prompt' is null"]
    assert parsed(chosen=GOOD, rejected=POOR) == ["no_dialogue"]
    assert parsed(prompt=None, chosen=f"{PROMPT} {GOOD}", rejected=f"{PROMPT} {POOR}")[0].chosen == [QUESTION, YES]


def test_text_between_or_behind_turns_of_chatml_is_not_dropped():
    turns = "<|im_start|>user\nHi<|im_end|>\n"
    assert messages.parse_chatml(turns + "<|im_start|>assistant\nYes<|im_end|>\n")
    for text in (
        turns + "STRAY <|im_start|>assistant\nYes<|im_end|>",
        turns + "<|im_start|>assistant\nYes<|im_end|> TAIL",
    ):
        assert messages.parse_chatml(text) is None
        with pytest.raises(UserError, match="rendered already"):
            parsed(prompt=text, chosen=GOOD, rejected=POOR)


def test_windows_line_ends_between_turns_are_line_ends():
    text = "\r\n\r\nHuman: Hi\r\nthere\r\n\r\nAssistant: Yes."
    assert [turn["content"] for turn in parsing.parse_transcript(text)] == ["Hi\nthere", "Yes."]


def test_a_reply_may_be_a_tool_call_alone_but_not_nothing():
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    (pair,) = parsed(prompt=[QUESTION], chosen=[calls], rejected=[NO])
    assert pair.chosen[-1] == calls
    assert parsed(prompt=[QUESTION], chosen=[{**calls, "tool_calls": None}], rejected=[NO]) == ["no_reply"]
    assert parsed(prompt=[QUESTION], chosen=[{"role": "assistant", "content": "", "name": "x"}], rejected=[NO]) == [
        "no_reply"
    ]


def test_replies_that_differ_in_a_tool_call_alone_are_two():
    one = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
    other = {**one, "tool_calls": [{"type": "function", "function": {"name": "oven", "arguments": {"unit": "F"}}}]}
    (pair,) = parsed(prompt=[QUESTION], chosen=[one], rejected=[other])
    assert pair.chosen != pair.rejected


def test_arguments_as_json_text_become_an_object_and_nulls_of_tables_go():
    call = {"type": "function", "id": None, "function": {"name": "oven", "arguments": json.dumps({"unit": "C"})}}
    (message,) = messages.normalized(
        [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "x",
        parsing.row_errors("row {}".format, 1, "pairs"),
    )
    assert message["tool_calls"] == [CALL]


def test_messages_with_more_than_text_are_not_merged():
    calls = {"role": "assistant", "content": "One", "tool_calls": [CALL]}
    plain = [{"role": "assistant", "content": text} for text in ("Two", "Three")]
    merged = messages.merge_same_speaker([calls, *plain])
    assert merged == [calls, {"role": "assistant", "content": "Two\n\nThree"}]


def test_a_template_that_leaves_a_part_out_is_found_out():
    calls = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert not messages.is_rendered([calls], None, ["user: Is the oven hot?"])
    assert messages.is_rendered([calls], None, ['Is the oven hot?\n{"name": "oven", "arguments": {"unit": "C"}}'])
    assert messages.is_rendered([[QUESTION, YES]], None, ["Is the oven hot?\nYes, it is."])
    assert not messages.is_rendered([[BRIEF, QUESTION, YES]], None, ["Is the oven hot?\nYes, it is."])


# -- Columns of other names --------------------------------------------------------------------------------------------


def renamed(text, **row):
    return parsing.parse_row(row, ROW_ERROR, shapes.parse_columns(text))


def test_columns_of_other_names_are_read_under_ours():
    columns = "prompt=q, chosen=good, rejected=bad, margin=strength, kind=topic, system=rules"
    row = {"q": ASKED, "good": GOOD, "bad": POOR, "strength": 2, "topic": "ovens", "rules": BRIEF["content"]}
    (pair,) = renamed(columns, **row)
    assert pair == Pair([BRIEF, QUESTION, YES], [BRIEF, QUESTION, NO], 2.0, "ovens")
    # ours win over columns that have our names already
    (pair,) = renamed("chosen=good,rejected=bad", prompt=ASKED, good=GOOD, bad=POOR, chosen="x", rejected="y")
    assert pair == Pair([QUESTION, YES], [QUESTION, NO])


@pytest.mark.parametrize(
    "row, margin",
    [
        ({"context": ASKED, "response1": POOR, "response2": GOOD, "overall_preference": 2}, 2.0),
        ({"question": ASKED, "answer_0": POOR, "answer_1": GOOD, "score_0": -0.5, "score_1": 0.5}, 1.0),
        ({"prompt": ASKED, "answers": [{"answer": GOOD, "rank": 1}, {"answer": POOR, "rank": 4}]}, 3.0),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": POOR, "score_chosen": 8.5, "score_rejected": 7}, 1.5),
        ({"prompt": ASKED, "response_1": GOOD, "response_2": POOR, "preference_strength": -2}, 2.0),
    ],
)
def test_the_strength_of_a_preference_can_be_the_margin(row, margin):
    (pair,) = renamed("margin=strength", **row)
    assert pair == Pair([QUESTION, YES], [QUESTION, NO], margin)
    assert parsed(**row)[0].label_margin == 0.0


def test_a_strength_that_a_form_does_not_have_is_named():
    with pytest.raises(UserError, match="this form has no strength"):
        renamed("margin=strength", prompt=ASKED, chosen=GOOD, rejected=POOR)


def test_a_column_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no column 'god' \(--columns\), did you mean 'good'\?; it has 'good', 'bad'"):
        renamed("chosen=god,rejected=bad", good=GOOD, bad=POOR)


@pytest.mark.parametrize(
    "text, words",
    [
        ("prompt", "'prompt' is not NAME=COLUMN"),
        ("prompt=", "'prompt=' is not NAME=COLUMN"),
        ("chosn=good", "'chosn' is not one of .*did you mean 'chosen'"),
        ("chosen=a,chosen=b", "a name is given twice"),
    ],
)
def test_what_is_wrong_with_columns_is_said(text, words):
    with pytest.raises(ValueError, match=words):
        shapes.parse_columns(text)
    assert shapes.parse_columns(None) == shapes.parse_columns("") == ()


def test_columns_like_a_dialogues_that_are_in_none_are_named():
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": POOR}
    assert parsed(**row, context="Read this.")[0].unused == ("context",)
    assert parsed(**row, input="a list", reasoning="because")[0].unused == ("input", "reasoning")
    assert parsed(**row, context="", history=None, turns=3, tools=None)[0].unused == ()
    # what is in the dialogue already, in whatever form, is not missing from it
    for same in (ASKED, [QUESTION], PROMPT, {"from": "human", "value": ASKED}):
        assert parsed(**row, messages=same)[0].unused == ()
    assert parsed(**row, messages=[QUESTION, {"role": "assistant", "content": "Other."}])[0].unused == ("messages",)


# -- A fuzz ------------------------------------------------------------------------------------------------------------

# spaces at the ends are no part of a text, and what looks like a turn or a template has tests of its own
WORDS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.just("")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "from", "content", "value", "text", "tool_calls", "rank"]), inner),
    ),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries({
    "role": st.sampled_from(["user", "assistant", "system", "human", "gpt", "Tool", "cat"]), "content": WORDS,
})  # fmt: skip
CELL = st.one_of(WORDS, WORDS, st.lists(MESSAGE, min_size=1, max_size=4), ANYTHING)
# columns that say which reply is better, and lists of replies, of which some may be equally good
CHOICES = {
    "answers",
    "completions",
    "better_response_id",
    "overall_preference",
    "labels",
    "winner",
    "score_0",
    "score_1",
    "preference_strength",
    "summaries",
    "choice",
}
NAMES = sorted({*shapes.KNOWN_NAMES, *shapes.DIALOGUE_COLUMNS, "anything"})


@st.composite
def rows_of_shapes(draw):
    """A row of one of the shapes: all as it should be, or with something odd in a column or two."""
    shape = draw(st.sampled_from(shapes.SHAPES))
    user, assistant = ([{"role": role, "content": draw(WORDS)}] for role in ("human", "assistant"))
    side = {"conversation_a": st.just(user), "conversation_b": st.just(user)}
    row = {
        column: draw(side.get(column, st.just([]))) + [{**assistant[0], "content": draw(WORDS)}]
        if column in side or draw(st.booleans()) else draw(WORDS)
        for column in shape.columns
    }  # fmt: skip
    choices = {
        "better_response_id": st.integers(0, 1), "overall_preference": st.integers(-2, 2), "labels": st.integers(0, 1),
        "winner": st.sampled_from(["model_a", "model_b", "tie"]), "score_0": st.integers(0, 2),
        "score_1": st.integers(0, 2), "preference_strength": st.integers(-3, 3), "choice": st.integers(0, 1),
        "summaries": st.lists(st.fixed_dictionaries({"text": WORDS}), min_size=2, max_size=2),
    }  # fmt: skip
    for column, keys in (("answers", ("answer", "rank")), ("completions", ("response", "overall_score"))):
        replies = st.fixed_dictionaries({keys[0]: WORDS, keys[1]: st.integers(0, 3)})
        choices[column] = st.lists(replies, min_size=1, max_size=4)
    row |= {name: draw(choices[name]) for name in row if name in choices}
    row[draw(st.sampled_from(shapes.PROMPT_COLUMNS))] = draw(st.sampled_from([user, user[0]["content"]]))
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True)):
        row.setdefault(name, draw(CELL))
    for name in draw(st.lists(st.sampled_from(sorted(row)), max_size=1)):
        row[name] = draw(CELL)
    return row


def texts_in(value):
    """The texts of a row's cell that a reader would see in a dialogue."""
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    if isinstance(value, dict):
        return [text for key, item in value.items() if key in ("content", "value", "answer", "response", "text",
                "full_text") for text in texts_in(item)]  # fmt: skip
    return [value.strip()] if isinstance(value, str) and value.strip() else []


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=st.one_of(rows_of_shapes(), st.dictionaries(st.sampled_from(NAMES), CELL), ANYTHING))
def test_whatever_a_row_holds_it_is_kept_whole_or_counted(row):
    try:
        pairs = parsing.parse_row(row, ROW_ERROR)
    except parsing.BadRow as error:
        assert error.reason.partition(": ")[0] in parsing.SKIP_REASONS
        return
    assert pairs
    kept = [pair for pair in pairs if not isinstance(pair, str)]
    assert {pair for pair in pairs if isinstance(pair, str)} <= parsing.SKIP_REASONS.keys()
    shape = shapes.shape_of(row)
    for pair in kept:
        dialogue = " ".join(text for side in (pair.chosen, pair.rejected) for text in messages.texts_of(side))
        dialogue += json.dumps(pair.tools)
        replies = [column for column in shape.columns if column not in CHOICES]
        wanted = {"messages", *replies, *shapes.DIALOGUE_COLUMNS} & row.keys() - {*pair.unused, "tools"}
        assert not [text for name in wanted for text in texts_in(row[name]) if text not in dialogue], (row, pair)
    ranked = [column for column in ("answers", "completions") if column in shape.columns]
    if ranked and len(kept) == len(pairs):
        dialogues = json.dumps([[pair.chosen, pair.rejected] for pair in kept], ensure_ascii=False)
        text, rank = ("answer", "rank") if ranked == ["answers"] else ("response", "overall_score")
        best = (min if rank == "rank" else max)(reply[rank] for reply in row[ranked[0]])
        worse = {reply[text] for reply in row[ranked[0]] if reply[rank] != best}
        assert all(reply in dialogues for reply in worse)


# -- From what people have ---------------------------------------------------------------------------------------------


def only(row):
    (pair,) = parsing.parse_row(row, lambda problem, key="wrong_type": UserError(problem))
    return pair


def test_helpsteers_prompts_of_several_turns_are_read_as_turns():
    prompt = "Tell me about C.\n<extra_id_1>Assistant\nC is old.\n<extra_id_1>User\nHow old?"
    pair = only({"prompt": prompt, "response_1": "Very.", "response_2": "No.", "preference_strength": -1})
    said = [("user", "Tell me about C."), ("assistant", "C is old."), ("user", "How old?"), ("assistant", "Very.")]
    assert [(turn["role"], turn["content"]) for turn in pair.chosen] == said


@pytest.mark.parametrize(
    "reply",
    [
        '{"name": "Bob", "role": "admin"}',
        '{"from": "Paris", "to": "Rome"}',
        '[{"role": "user", "content": "Hello"}]',
        '{"role": "assistant", "content": "Sure, here it is."}',
        "Human: the species that writes this.",
        "    return 1\n    # done",
    ],
)
def test_a_reply_that_looks_like_something_else_stays_what_it_is(reply):
    assert only({"prompt": "Write it.", "chosen": reply, "rejected": "No."}).chosen[-1]["content"] == reply


def test_a_side_that_goes_on_with_several_turns_is_read_as_turns():
    side = "\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant: {}"
    pair = only({"prompt": "\n\nHuman: Hi", "chosen": side.format("Fine."), "rejected": side.format("Bad.")})
    assert [turn["content"] for turn in pair.chosen] == ["Hi", "Hello.", "How are you?", "Fine."]


@pytest.mark.parametrize("prompt", ["And now?", "user: Is the oven hot?\nassistant: Yes, it is.\nuser: And now?"])
def test_a_prompt_that_the_sides_hold_already_is_not_put_in_front(prompt):
    before = [QUESTION, YES, {"role": "user", "content": "And now?"}]
    pair = only({"prompt": prompt, "chosen": [*before, YES], "rejected": [*before, NO]})
    assert pair.chosen == [*before, YES] and pair.rejected == [*before, NO]


def test_a_conversation_of_inputs_and_outputs_is_one_of_turns():
    conversation = [{"input": QUESTION["content"], "output": YES["content"]}]
    pair = only({"conversation": conversation, "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]})
    assert (pair.chosen, pair.rejected) == ([QUESTION, YES], [QUESTION, NO])


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": QUESTION["content"], "output_1": NO["content"], "output_2": YES["content"], "label": 2},
        {"prompt": QUESTION["content"], "response_a": YES["content"], "response_b": NO["content"], "winner_model_a": 1,
         "winner_model_b": 0, "winner_tie": 0},
    ],
    ids=["OffsetBias", "votes"],
)  # fmt: skip
def test_labels_that_pick_one_of_two_replies(row):
    pair = only(row)
    assert (pair.chosen, pair.rejected) == ([QUESTION, YES], [QUESTION, NO])


def test_a_row_of_several_replies_is_lost_only_if_all_its_pairs_are(write_rows, tokenizer):
    rows = [
        {"prompt": f"Is oven {n} hot?", "completions": [
            {"response": "Yes, it is.", "overall_score": 3}, {"response": "", "overall_score": 2},
            {"response": "No.", "overall_score": 1}]}
        for n in range(60)
    ]  # fmt: skip
    train, test = data.load_pairs(str(write_rows(rows)), tokenizer)
    assert train.counts.rows + test.counts.rows == 60 == len(train) + len(test)
    train.check_skipped()
    assert train.counts.count["no_reply"] == len(train) and test.counts.count["no_reply"] == len(test) > 0


def test_a_template_that_wants_the_arguments_of_calls_as_text_gets_them(base):
    wants_text = models.load_tokenizer(base)
    wants_text.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}\n{% endfor %}"
    )
    call = {"function": {"name": "oven", "arguments": '{"number": 1}'}}
    dialogue = messages.normalized(
        [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}], "chosen", None
    )
    assert tokenization.render([dialogue], wants_text)[0].endswith('assistant: oven {"number": 1}')
