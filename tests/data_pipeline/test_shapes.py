"""shapes.py and messages.py: preference sets as they are published become the same dialogues."""

import json
import math

import pytest

from data_pipeline import messages, parsing
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
    assert messages.is_rendered([calls], None, ['{"name": "oven", "arguments": {"unit": "C"}}'])
    assert messages.is_rendered([[QUESTION, YES]], None, ["anything"])
