"""report.html as a reader sees it: in words, in a browser at two widths, and printed."""

import re
import shutil
from pathlib import Path

import pytest

from tests.evaluation.conftest import FP32

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAIRS = 37
TEXTS_CUT_OFF = """
() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1;
  }).map(text => text.textContent);
})
"""
LONG = "a word " * 60


@pytest.fixture
def perfect_page(evaluate, length_model, write_rows):
    """The report on a model that prefers the longer reply, of pairs whose chosen reply is the longer one."""
    rows = [
        {"prompt": f"Question {number}: {LONG}?", "chosen": f"yes {LONG}", "rejected": "no " * (number % 9 + 1)}
        for number in range(PAIRS)
    ]
    dataset = write_rows([*rows, {"prompt": "Which?", "chosen": "a", "rejected": "b"}], "pairs.jsonl")
    evaluate(length_model, "--split", "all", *FP32, dataset=dataset)
    return Path("out/report.html")


def test_the_page_explains_itself(perfect_page):
    page = perfect_page.read_text(encoding="utf-8")
    text = " ".join(page.split())
    assert "the higher reward to the chosen reply in <b>37</b> of them, to the rejected one in 0; 1 tie." in text
    assert "no pair is wrong, so any rewards could only be too small" in text and "1 is perfect" not in text
    assert "a perfectly calibrated model: about 0.0%" in text
    assert page.count("<figure>") == page.count('<figcaption class="muted">') >= 4, "each plot says how to read it"
    assert ">37</text>" in page, "the number of pairs on the dot of the calibration plot"
    assert "Here the trend" in page and ">trend</text>" in page
    assert "Near-ties" in page, "the pair whose replies have the same length"
    summaries = re.findall(r"<summary>(.*?)</summary>", page, flags=re.DOTALL)
    assert len(summaries) == 1, "no mistakes, and of 38 pairs one is a near-tie"
    assert "<b>Δr +0.000</b> Which?" in summaries[0]


def test_a_long_prompt_is_cut_in_a_folded_pair(evaluate, length_model, write_rows):
    rows = [{"prompt": f"Question {number}:\n\n{LONG}?", "chosen": "no", "rejected": LONG} for number in range(3)]
    evaluate(length_model, "--split", "all", *FP32, dataset=write_rows(rows, "pairs.jsonl"))
    page = Path("out/report.html").read_text(encoding="utf-8")
    shown = re.findall(r"</b> (Question \d: a word .*)\n", page)
    assert len(shown) == 3 and all(len(words) <= 91 and words.endswith("…") for words in shown)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_fits_a_phone_and_prints_in_full_on_white(perfect_page):
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        page.goto(perfect_page.absolute().as_uri())
        background = "getComputedStyle(document.body).backgroundColor"
        is_too_wide = "document.documentElement.scrollWidth > innerWidth"
        assert not page.evaluate(is_too_wide) and page.evaluate(background) == "rgb(18, 22, 28)"
        assert page.evaluate(TEXTS_CUT_OFF) == []
        replies = page.locator("details .reply")
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = false })")
        assert replies.count() == 2 and not replies.first.is_visible()

        page.set_viewport_size({"width": 680, "height": 1000})  # A4 less its margins
        page.emulate_media(media="print")
        assert not page.evaluate(is_too_wide)
        assert page.evaluate(background) == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.querySelector('figure')).color") == "rgb(29, 36, 48)"
        assert replies.first.is_visible() and replies.last.bounding_box()["height"] > 10, "folds are printed open"
        assert not page.get_by_text("A click on a line").first.is_visible()
        printed = page.pdf(format="A4")
        assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") >= 2
        browser.close()
