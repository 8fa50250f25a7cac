"""The Rollouts tab: what a run's file holds is shown, sorted and compared, as text, while the run goes on."""

import re
import sqlite3

import gradio as gr
import pytest

from chat_app.engine import ChatEngine
from chat_app.rollouts_tab import ALL_PROMPTS, NOTHING, PAGE, RolloutsTab, View
from checkpointing import rollout_file, run_folder
from checkpointing.rollout_file import AT_LIMIT, BY_ITSELF, HELD_OUT, TRAINING, RolloutFile
from tests.chat_app.test_app import CHROMIUM, PHONE, browser, expect, new_context, open_page, warm_context  # noqa: F401

HOSTILE = "<img src=x onerror=\"document.title='owned'\"> ${document.title='owned'} {{value}} {{#if}} a < b:\n    c"
SHOWN = ("newest", "limit", "step", "prompt", "old", "replies", "more", "curves")


def row(step, prompt, completion, reply, reward, advantage=0.5, ended=BY_ITSELF, judge=None):
    return (step, prompt, completion, f"question {prompt}", reply, reward, advantage, step / 10, 12, ended, judge)


def write_run(folder, steps=3):
    """A run with groups of three replies to prompts 7 and 8, prompt 7 at each step, and replies to held-out 0 to 59."""
    folder.mkdir()
    file = RolloutFile(folder / rollout_file.ROLLOUTS, 0)
    for step in range(1, steps + 1):
        add_step(file, step)
    for step in (0, 2):
        rows = [row(step, n, 0, f"held {n} at {step}", n + step * n % 7, None, judge=step / 2) for n in range(60)]
        file.add(HELD_OUT, rows)
    file.close()
    return folder


def add_step(file, step):
    replies = [(HOSTILE, 1.0 + step, BY_ITSELF), ("second", 9.0, AT_LIMIT), ("third", -1.0, BY_ITSELF)]
    file.add(TRAINING, [
        row(step, prompt, number, reply, reward, ended=ended) for prompt in (7, 100 + step)
        for number, (reply, reward, ended) in enumerate(replies)
    ])  # fmt: skip


@pytest.fixture
def tab(tmp_path):
    with gr.Blocks(), gr.Tab() as inside:
        return RolloutsTab(ChatEngine("nowhere/nothing"), inside, tmp_path)


def view(run="a", table=TRAINING, step=None, prompt=None, old=None, **others):
    filters = {"sort": "reward", "is_descending": True, "text": "", "ended": "", "low": "", "high": ""}
    return View(run, table, step, prompt, old, **{**filters, **others})


def show(tab, *arguments, limit=PAGE, distance=0, **others):
    return dict(zip(SHOWN, tab.show(limit, view(*arguments, **others), distance), strict=True))


def replies_in(shown):
    return re.findall(r'</header><div class="text" dir="auto">(.*?)</div>', shown["replies"], re.DOTALL)


def values_of(dropdown):
    return [value for _, value in dropdown.choices]


def test_a_group_is_shown_sorted_and_filtered_with_its_numbers(tab, tmp_path):
    write_run(tmp_path / "a")
    shown = show(tab)
    assert (shown["step"].value, shown["prompt"].value, shown["old"].value) == (3, 7, NOTHING)
    assert (
        "Step 3: 3 replies, mean reward +4.000" in shown["replies"] and "Also sampled at step 1, 2" in shown["replies"]
    )
    second, hostile, third = replies_in(shown)
    assert (second, third) == ("second", "third") and "&lt;img" in hostile and "<img" not in shown["replies"]
    for words in ("reward <b>+9.000", "advantage <b>+0.50", "KL <b>0.30", "tokens <b>12", "ended <b>at the limit"):
        assert words in shown["replies"]
    assert replies_in(show(tab, is_descending=False))[0] == "third"
    assert replies_in(show(tab, ended=AT_LIMIT)) == ["second"] and replies_in(show(tab, text="THIRD")) == ["third"]
    shown = show(tab, low="-2", high="4,5")
    assert len(replies_in(shown)) == 2 and "2 of 3 replies" in shown["replies"]
    assert "0 of 3 replies" in show(tab, text="nothing like it")["replies"]
    assert len(replies_in(show(tab, prompt=ALL_PROMPTS))) == 6


def test_the_same_prompt_at_two_steps_is_side_by_side_the_older_first(tab, tmp_path):
    write_run(tmp_path / "a")
    shown = show(tab, step=1, prompt=7, old=3)
    assert values_of(shown["old"]) == [NOTHING, 2, 3]
    assert shown["replies"].index("Step 1: 3 replies") < shown["replies"].index("Step 3: 3 replies")
    assert len(replies_in(shown)) == 6
    assert values_of(show(tab, step=1, prompt=101)["old"]) == [NOTHING], "sampled once"


def test_held_out_replies_are_compared_with_those_of_the_start_page_by_page(tab, tmp_path):
    write_run(tmp_path / "a")
    shown = show(tab, table=HELD_OUT, sort="change")
    assert (shown["step"].value, shown["prompt"].value, shown["old"].value) == (2, ALL_PROMPTS, 0)
    found = replies_in(shown)
    assert len(found) == 2 * PAGE and found[:4] == ["held 3 at 0", "held 3 at 2", "held 10 at 0", "held 10 at 2"]
    assert "(+6.000)" in shown["replies"] and "judge <b>+1.00" in shown["replies"] and shown["more"].visible
    more = show(tab, table=HELD_OUT, sort="change", limit=2 * PAGE)
    assert len(replies_in(more)) == 120 and not more["more"].visible and more["limit"] == 2 * PAGE
    alone = show(tab, table=HELD_OUT, prompt=10, step=2)
    assert replies_in(alone) == ["held 10 at 0", "held 10 at 2"]
    assert len(replies_in(show(tab, table=HELD_OUT, old=NOTHING))) == PAGE


def test_choices_that_are_not_there_are_replaced_and_steps_end_at_both_ends(tab, tmp_path):
    write_run(tmp_path / "a")
    shown = show(tab, step=99, prompt=101, old=55)
    assert (shown["step"].value, shown["prompt"].value, shown["old"].value) == (3, 7, NOTHING)
    assert [show(tab, step=2, distance=d)["step"].value for d in (-1, 1)] == [1, 3]
    assert show(tab, step=3, distance=1)["step"].value == 3 and show(tab, step=1, distance=-1)["step"].value == 1


def test_curves_say_in_words_what_they_draw(tab, tmp_path):
    write_run(tmp_path / "a")
    curves = show(tab)["curves"]
    assert "Mean reward: training 3.33 at step 1, 4 at 3; held-out 29.5 at step 0, 32.5 at 2" in curves
    assert curves.count("<svg role") == 4 and "KL from the start" in curves and "Share cut at the limit" in curves


def test_refresh_finds_new_runs_and_steps_and_stays_where_the_visitor_is(tab, tmp_path):
    (tmp_path / "no run").mkdir()
    write_run(tmp_path / "old")
    record = run_folder.new_record("train_grpo.py", 1, 9, {}, {})
    record.started = "2020-01-01T00:00:00+00:00"
    run_folder.write_record(tmp_path / "old", record)
    run_folder.write_record(write_run(tmp_path / "new", steps=1), run_folder.new_record("train_grpo.py", 1, 9, {}, {}))

    def refreshed(newest, **chosen):
        run, *shown = tab.refresh(newest, PAGE, *vars(view(**chosen)).values())
        return run, dict(zip(SHOWN, shown, strict=True))

    run, shown = refreshed(None, run=None)
    assert [name for _, name in run.choices] == ["new", "old"] and run.value == "new" and shown["newest"] == 1
    assert run.choices[0][0] == "new (crashed)", "its record says that it runs, and nobody holds its lock"
    file = RolloutFile(tmp_path / "new" / rollout_file.ROLLOUTS, 1)
    add_step(file, 2)
    assert refreshed(1, run="new", step=1)[1]["step"].value == 2, "the newest step was shown"
    add_step(file, 3)
    file.close()
    assert refreshed(3, run="new", step=2)[1]["step"].value == 2
    assert refreshed(3, run="gone")[0].value == "new"


def test_what_cannot_be_read_is_said_in_plain_words(tab, tmp_path, monkeypatch):
    assert "train_grpo.py --demo" in tab.refresh(None, PAGE, *vars(view()).values())[6]
    folder = write_run(tmp_path / "a")
    path = folder / rollout_file.ROLLOUTS
    assert "Reward from: expected a number, got &#x27;x&#x27;" in show(tab, low="x")["replies"]
    for name in ("..", "../a", "gone", "", None):
        assert "this run is gone" in show(tab, run=name)["replies"]
    monkeypatch.setattr(rollout_file, "READER_PATIENCE", 0.1)
    locking = sqlite3.connect(path)
    locking.execute("BEGIN EXCLUSIVE")
    assert "locked by another program" in show(tab)["replies"]
    locking.close()
    path.write_bytes(b"no database" * 1000)
    shown = show(tab)
    assert "damaged" in shown["replies"] and shown["step"].choices == [] and not shown["more"].visible
    path.write_bytes(b"")
    assert "no step is complete yet" in show(tab)["replies"]
    assert "the run&#x27;s next evaluation keeps them" in show(tab, table=HELD_OUT)["replies"]
    path.unlink()
    assert "--no_save_rollouts" in show(tab)["replies"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.flaky(reruns=1)  # as those of test_app.py
@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, {"viewport": PHONE}], ids=["desktop, dark", "phone"])
def test_with_the_keyboard_alone_a_visitor_reads_filters_and_compares(server, open_page, options):  # noqa: F811
    name = f"run-{len(options.get('viewport', ()))}"
    folder = write_run(server.policy_dir / name)
    page = open_page(**options)
    page.get_by_role("tab", name="Rollouts").focus()
    page.keyboard.press("Enter")
    articles, step = page.locator("#rollouts-replies article"), page.locator("#rollouts-step input")
    expect(articles).to_have_count(3)
    run = page.locator("#rollouts-run input")
    if run.input_value() != name:
        run.focus()
        page.keyboard.type(name)
        page.keyboard.press("Enter")
    expect(articles.nth(1)).to_contain_text("<img src=x onerror")
    expect(articles.nth(1)).to_contain_text("${document.title='owned'} {{value}} {{#if}}")
    assert page.title() == "rl-with-rm" and page.locator("#rollouts-replies img").count() == 0
    file = RolloutFile(folder / rollout_file.ROLLOUTS, 3)
    add_step(file, 4)
    file.close()
    page.get_by_role("button", name="Refresh").focus()
    page.keyboard.press("Enter")
    expect(step).to_have_value("4 of 4")
    page.get_by_role("button", name="Earlier step").focus()
    page.keyboard.press("Enter")
    expect(step).to_have_value("3 of 4")
    page.locator("#rollouts-old input").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(articles).to_have_count(6)
    page.get_by_role("button", name="Sort and filter").focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)  # Gradio builds what it opens with the initial values: text typed meanwhile is lost
    page.locator("#rollouts-text").get_by_role("textbox").focus()
    page.keyboard.type("third", delay=30)
    expect(articles).to_have_count(2)
    page.get_by_label("held out").focus()
    page.keyboard.press("Space")
    expect(page.locator("#rollouts-replies h4").first).to_have_text("Step 2: 0 replies")
    page.locator("#rollouts-text").get_by_role("textbox").fill("")
    expect(articles).to_have_count(2 * PAGE)
    page.get_by_role("button", name="Show more").focus()
    page.keyboard.press("Enter")
    expect(articles).to_have_count(120)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"
