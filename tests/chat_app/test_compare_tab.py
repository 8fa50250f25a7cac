"""compare_tab.py: rewards by word, and how they are coloured."""

import re

import pytest

from chat_app import compare_tab
from chat_app.compare_tab import END, coloured, reward_by_word


def test_a_words_change_is_the_sum_of_its_tokens_changes():
    tokens = [
        ["Kn", 0.0],
        ["ead", 1.0],
        [" the", 1.5],
        [" do", 1.0],
        ["ugh", 3.0],
        [".", 2.5],
        ["<|im_end|>", 4.0],
        ["\n", 5.0],
    ]
    assert reward_by_word(tokens, "Knead the dough.") == [("Knead", 1.0), (" the", 1.5), (" dough.", 2.5), (END, 5.0)]


@pytest.mark.parametrize(
    "pieces, reply, wanted",
    [
        (["a", "\n\n", "- b"], "a\n\n- b", ["a", "\n\n", "- b"]),
        (["Hi", "\n", "you"], " Hi\nyou ", ["Hi", "\n", "you"]),  # the template stripped the reply
        (["", "\U0001f642", "!", "<e>"], "\U0001f642!", ["\U0001f642!", END]),  # several tokens of one character
        (["面包", "很", "好"], "面包很好", ["面包", "很", "好"]),
        (["Yes", ".<e>"], "Yes.", ["Yes."]),  # a token that reaches over the end
    ],
)
def test_every_character_of_a_reply_is_in_one_word(pieces, reply, wanted):
    assert [text for text, _ in reward_by_word([[piece, 0.0] for piece in pieces], reply)] == wanted


def test_the_largest_change_is_the_strongest_colour_but_the_ends():
    words = [("a", 0.0), (" b", 1.0), (" <c>", 0.5), (END, 9.0)]
    shown = re.findall(
        r'<mark class="(\w+)" style="--share: ([\d.]+)" title="([^"]+)">(.*?)</mark>', coloured("A", words)
    )
    assert shown == [
        ("up", "1.00", "+1.000", " b"),
        ("down", "0.50", "-0.500", " &lt;c&gt;"),
        ("up", "1.00", "+8.500", END),
    ]


def test_a_reply_without_rewards_by_token_says_so():
    assert "no reward before the end" in coloured("B", [])
    assert compare_tab.reward_plot([[], []]).visible is False


@pytest.mark.parametrize(
    "p_a, wanted",
    [
        (0.5, "sees no difference"),
        (0.75, "prefers A</b> with probability <b>75.0%"),
        (0.1, "prefers B</b> with probability <b>90.0%"),
        (0.99999, "over 99.9%"),
    ],
)
def test_the_verdict_names_the_preferred_reply_first(p_a, wanted):
    verdict = compare_tab.verdict_of({"p_a": p_a, "reward_a": 1.0, "reward_b": -1.0})
    assert wanted in verdict and verdict.startswith("<b>The reward model")
