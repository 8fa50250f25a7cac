"""The page in a real browser: what a person sees and does, at desktop and phone width, with the mouse or the keyboard.

    SCREENSHOTS=docs SCREENSHOT_MODEL=checkpoints/rm/first python -m pytest tests/chat_app/test_app.py -k demos

also writes the README's picture, with the rewards of that run.
"""

import json
import os
import random
import re
import shutil
import time

import pytest

from tests.chat_server import Server, free_port

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = sync_api.expect
expect.set_options(timeout=60_000)  # a busy machine is slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Gradio loses a click or a text now and then while it builds its page: a test that fails is tried once more, and the
# second failure counts. A run prints how many there were.
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"), pytest.mark.flaky(reruns=1),
]  # fmt: skip

QUESTION = "What should I know about bread?"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><b>bold</b> & </textarea> if a < b:\n    c &lt; d"
# Gradio's own messages: a page was closed during a request, its session was gone before its stream was opened, or a
# reply was cancelled before the server gave it an id
FROM_GRADIO = (
    r"^AbortError: (signal is|BodyStreamBuffer was) aborted|^Unexpected error Connection errored out|^Failed to fetch"
    r"|^Unexpected error 404: Not Found"
    r"|^Failed to load resource: .* 422 .*/gradio_api/(cancel|reset)$"
    # the stream of a page that was reloaded ends in the middle; whether Chromium still says so depends on its timing
    r"|^Failed to load resource: net::ERR_INCOMPLETE_CHUNKED_ENCODING .*/gradio_api/queue/data\?session_hash=\w+$"
    r"|^TypeError: network error .*/assets/index-[\w-]+\.js$"
)
# A tab that is constantly hidden and shown again, and so busy that pieces of a reply arrive together
HIDING = """
let asked = 0;
Object.defineProperty(Document.prototype, "visibilityState", { get: () => asked++ % 2 ? "hidden" : "visible" });
setInterval(() => { const start = performance.now(); while (performance.now() - start < 400); }, 500);
"""
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def new_context(browser):
    def new(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        return context

    return new


@pytest.fixture(scope="module")
def warm_context(new_context):
    """A browser context in which Gradio's JavaScript is cached: the page opens a second earlier."""
    with new_context() as context:
        yield context


@pytest.fixture
def open_page(new_context, warm_context, server):
    """Open the page as a new visitor; in the end it must show no error and no request to another host."""
    contexts, problems = [], []

    def open_it(hiding=False, **options):
        is_warm = not warm_context.pages and not options
        context = warm_context if is_warm else new_context(**options)
        contexts.append(context)
        page = context.new_page()
        if is_warm:  # forget the conversations of earlier tests
            page.goto(f"{server.url}config")
            page.evaluate("localStorage.clear()")
        if hiding:
            page.add_init_script(HIDING)
        page.on("console", note_error)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: is_foreign(request.url) and problems.append(f"asked for {request.url}"))
        page.goto(server.url)
        expect(message_box(page)).to_be_visible()
        # what is clicked before Gradio has shown its first answers can be lost
        expect(page.locator("#status dl")).to_be_visible()
        page.wait_for_timeout(200)
        return page

    def note_error(message):
        if message.type == "error":
            problems.append(f"{message.text} {message.location['url']}")

    def is_foreign(url):
        return not url.startswith((server.url, server.url.replace("http", "ws"), "data:", "blob:"))

    yield open_it
    for context in contexts:
        if context is not warm_context:
            context.close()
    for page in warm_context.pages:
        page.close()
    assert [problem for problem in problems if not re.search(FROM_GRADIO, problem)] == []


def message_box(page):
    return page.locator("#message textarea")


def replies(page):
    return page.locator("#chat .bot.message")


def rewards(page):
    return page.locator("#chat small.footer")


def send(page, text, length=24):
    expect(page.locator("#message button.submit-button")).to_be_visible()  # an earlier reply has ended
    set_slider(page, "Max new tokens", length)
    if length > 1000:  # a sampled reply might end too early
        set_slider(page, "Temperature", 0)
    message_box(page).fill(text)
    message_box(page).press("Enter")


def ask(page, text, count=1, length=24):
    """Send a message and wait until `count` replies have their rewards."""
    send(page, text, length)
    expect(rewards(page)).to_have_count(count)
    expect(page.locator("#message button.submit-button, #message button.stop-button")).to_have_count(1)
    expect(page.locator("#message button.submit-button")).to_be_visible()


def wait_for_words(page):
    """Wait until the reply has words: stopped earlier, it would leave nothing to score."""
    expect(page.locator("#chat .bot .md").last).not_to_be_empty()


def open_settings(page):
    page.get_by_role("button", name="Generation settings").click()
    page.wait_for_timeout(500)  # Gradio builds what it opens with the initial values: text typed meanwhile is lost


def set_slider(page, label, value):
    box = page.get_by_label(f"number input for {label}")
    if not box.is_visible():
        open_settings(page)
    box.fill(str(value))
    box.press("Tab")
    expect(box).to_have_value(str(value))


def wait_until_saved(page, count):
    """Wait until the browser has saved `count` replies in all: a reply is saved just after it is shown."""
    page.wait_for_function(
        """count => Object.keys(localStorage).filter(key => key.startsWith("rl-with-rm/conversation/"))
        .flatMap(key => JSON.parse(localStorage.getItem(key)).conversation.messages)
        .filter(message => message.role === "assistant").length === count""",
        arg=count,
    )


def picture(page, name, **options):
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Chat
# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_opens_and_names_the_loaded_models(open_page):
    page = open_page()
    expect(message_box(page)).to_be_editable()
    expect(page.locator("#status")).to_contain_text("parameters, fp32 on cpu")
    expect(page.locator("#status")).to_contain_text("bread / step-2 (newest)")


def test_the_first_screen_says_what_a_reward_is_and_an_example_gets_one(open_page):
    page = open_page()
    expect(page.locator("#chat")).to_contain_text(
        "A reward is a number that guesses how much people would like a reply"
    )
    expect(page.get_by_label("number input for Best of N")).to_be_visible()
    expect(page.locator("#load-here")).to_be_hidden()
    set_slider(page, "Max new tokens", 8)
    message_box(page).fill("a draft")
    expect(page.locator("#chat .example")).to_have_count(3)
    page.locator("#chat .example").first.click()
    expect(rewards(page)).to_have_count(1)
    expect(page.locator("#chat .user.message")).to_contain_text("why the sky is blue")
    expect(message_box(page)).to_have_value("a draft")
    page.locator("#switch-models").click()
    expect(page.locator("#policy")).to_be_visible()


def test_without_a_model_the_chat_offers_to_load_one(new_context, reward_checkpoint, tmp_path):
    folders = ["--output_dir", reward_checkpoint.parent.parent, "--votes_file", tmp_path / "votes.jsonl"]
    with Server(*folders, "--port", free_port()) as server, new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        page.locator("#chat .example").first.click()
        expect(page.locator(".toast-body")).to_contain_text("no model is loaded yet: press Load")
        expect(page.locator("#load-here")).to_have_text("Load Qwen/Qwen3-0.6B")
        page.locator("#load-here").click()  # offline
        expect(page.get_by_text("choose a model of this machine under Models")).to_be_visible()
        page.locator("#switch-models").click()
        page.locator("#policy input").click()
        page.get_by_role("option", name="(base of bread)").click()
        page.locator("#reward-model input").click()
        page.get_by_role("option", name="bread / step-2").click()
        page.locator("#load").click()
        expect(page.locator("#status")).to_contain_text("bread / step-2 (newest) · ")
        page.get_by_role("tab", name="Chat").click()
        expect(page.locator("#load-here")).to_be_hidden()
        set_slider(page, "Max new tokens", 8)
        page.locator("#chat .example").first.click()
        expect(rewards(page)).to_have_count(1)


def test_a_question_sent_at_once_is_not_lost(open_page):
    page = open_page()
    ask(page, "An earlier talk", length=8)
    wait_until_saved(page, 1)
    for number in range(3):
        page.reload()
        message_box(page).fill(f"Sent at once {number}")
        message_box(page).press("Enter")
        expect(page.locator("#chat .user.message").last).to_contain_text(f"Sent at once {number}")
        expect(rewards(page)).not_to_have_count(0)
        expect(page.locator("#message button.submit-button")).to_be_visible()
        expect(page.locator("#chat .user.message").last).to_contain_text(f"Sent at once {number}")
        page.wait_for_function("number => Object.values(localStorage).join().includes(`at once ${number}`)", arg=number)
    texts = page.evaluate("Object.values(localStorage).join()")
    assert all(f"Sent at once {number}" in texts for number in range(3)) and "An earlier talk" in texts


def test_a_reply_streams_in_and_gets_its_reward(open_page):
    page = open_page()
    send(page, QUESTION, length=1500)
    started = time.perf_counter()
    wait_for_words(page)
    written = page.locator("#chat .bot .md")
    lengths = []
    while len(set(lengths)) < 4 and time.perf_counter() - started < 30:
        lengths.append(len(written.inner_text()))
    assert len(set(lengths)) == 4 and lengths == sorted(lengths)
    page.locator("#message button.stop-button").click()
    expect(rewards(page)).to_have_text(re.compile(r"^reward [+-]\d+\.\d{3} · stopped early$"), timeout=5_000)


def test_stop_ends_the_reply_within_a_second_and_the_next_message_is_answered(open_page):
    page = open_page()
    send(page, QUESTION, length=1900)
    wait_for_words(page)
    page.locator("#message button.stop-button").click()
    page.wait_for_timeout(1000)
    stopped_at = replies(page).first.inner_text()
    page.wait_for_timeout(700)
    assert replies(page).first.inner_text() == stopped_at
    ask(page, "And now?", count=2)
    expect(rewards(page).first).to_have_text(re.compile(r"^reward [+-]\d+\.\d{3} · stopped early$"))  # and no rank


@pytest.mark.parametrize("end", ["Stop", "Retry, Stop", "Switch", "Reload", "Edit, Stop"])
def test_a_reply_ended_at_any_moment_leaves_no_error(open_page, end):
    page = open_page()
    page.get_by_label("Toggle Sidebar").click()
    ask(page, "Another talk", length=8)
    page.locator("#new-chat").click()
    expect(replies(page)).to_have_count(0)
    ask(page, QUESTION, length=12)
    set_slider(page, "Max new tokens", 1900)
    set_slider(page, "Temperature", 0)
    moments = random.Random(end)
    for number in range(4):
        if number and "," not in end:  # questions in one chat would soon be too long for the small model
            page.locator("#new-chat").click()
            expect(replies(page)).to_have_count(0)
        start_writing(page, end if number else "Stop")
        page.wait_for_timeout(moments.uniform(0, 1500))
        if end == "Switch":
            page.get_by_role("radio", name="Another talk").click()
            expect(page.locator("#chat .user.message").first).to_contain_text("Another talk")
            page.get_by_role("radio", name=QUESTION).first.click()
            expect(page.locator("#chat .user.message").first).to_contain_text(QUESTION)
        elif end == "Reload":
            page.reload()
            expect(page.locator("#chat .user.message").first).to_contain_text(QUESTION)
            page.get_by_label("Toggle Sidebar").click()
            set_slider(page, "Max new tokens", 1900)
        else:
            page.locator("#message button.stop-button").click()
        expect(page.locator("#message button.submit-button")).to_be_visible()
        expect(page.get_by_text("Error", exact=True)).to_have_count(0)
        if end != "Reload":  # where the last words were not yet saved
            expect(page.locator("#chat .bot.message").last).to_contain_text("stopped")


def start_writing(page, how):
    if how.startswith("Retry"):
        page.get_by_label("Retry").last.click()
    elif how.startswith("Edit"):
        page.get_by_label("Edit").last.click()
        page.locator("textarea.edit-textarea").fill(QUESTION)
        page.get_by_label("Submit", exact=True).last.click()
    else:
        message_box(page).fill(QUESTION)
        page.wait_for_timeout(200)  # a key that is pressed while Gradio still takes in the text sends the old one
        message_box(page).press("Enter")
    expect(page.locator("#message button.stop-button")).to_be_visible()


@pytest.mark.parametrize("click", ["Stop", "New chat"])
def test_a_reply_stopped_before_its_first_word_does_not_appear_later(open_page, click):
    page = open_page()
    page.get_by_label("Toggle Sidebar").click()
    send(page, QUESTION, length=1900)
    page.locator("#message button.stop-button" if click == "Stop" else "#new-chat").click()
    expect(page.locator("#message button.submit-button")).to_be_visible()
    page.wait_for_timeout(700)
    shown = page.locator("#chat").inner_text()
    page.wait_for_timeout(700)
    assert page.locator("#chat").inner_text() == shown
    ask(page, "And now?", length=8, count=rewards(page).count() + 1)


def test_waiting_visitors_see_their_place_in_the_queue_and_are_served(open_page):
    first, second, third = (open_page() for _ in range(3))
    send(first, QUESTION, length=1900)
    wait_for_words(first)
    send(second, QUESTION)
    send(third, QUESTION)
    expect(third.locator("#chat")).to_contain_text(re.compile(r"queue: \d/\d"))
    first.locator("#message button.stop-button").click()
    for waiting in (second, third):
        expect(rewards(waiting)).to_have_count(1)


def test_texts_are_shown_character_by_character_and_never_run(open_page):
    page = open_page()
    ask(page, HOSTILE)
    shown = page.locator("#chat .user .md").first
    assert shown.inner_text() == HOSTILE
    assert page.locator("#chat img, #chat b").count() == 0 and page.title() != "owned"
    page.get_by_label("Copy message").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == HOSTILE
    page.get_by_label("Copy message").last.click()
    copied = page.evaluate("navigator.clipboard.readText()")  # what is shown may differ: some chance words are Markdown
    assert copied.strip() and copied != HOSTILE and not re.search(r"reward [+-]\d", copied), "the line below it stays"


MARKDOWN = """# Bread
**Knead** it, see [this](https://example.org/?a=1&b=2&copy=3).

| flour | water |
|---|---|
| 500 g | 350 g |

```python
if a < b and "&lt;" != "<b>":
    print("rise")
```

So $e^{i\\pi} = -1$ costs $5 or $6, and $$\\frac{a}{b} < c$$ `x<b>y &amp;`"""
ATTACK = """<img src=x onerror="document.title='owned'"><b id="bad">bold</b><script>document.title='owned'</script>

![remote](https://example.org/x.png) ![ref][r] <svg onload="document.title='owned'"> &lt;b&gt;

[click](javascript:document.title='owned') [data](data:text/html,<script>document.title='owned'</script>)

$$<img src=x onerror="document.title='owned'">$$ \\(\\href{javascript:document.title='owned'}{x}\\)
$$\\includegraphics{https://example.org/y.png}$$ `</code><img src=x>` %%%LATEX_BLOCK_9%%%

```mermaid
graph TD; A["<img src=x onerror=alert(1)>"] --> B; click A "javascript:document.title='owned'"
```

```html"><img src=x onerror="document.title='owned'">
<b>code</b>
	a <	b
```

[r]: https://example.org/z.png
<style>body { background: url(https://example.org/s.png) }</style>
<iframe src="https://example.org"></iframe> <a href="javascript:alert(1)">a</a>"""


def show_reply(page, reply):
    """Open a saved conversation in which the model has replied with a text."""
    answer = {"role": "assistant", "content": reply, "thinking": "", "others": []}
    chat = {"id": "x", "system_prompt": "", "messages": [{"role": "user", "content": QUESTION}, answer]}
    kept = json.dumps({"time": 1, "title": QUESTION, "conversation": chat})
    page.evaluate("kept => localStorage.setItem('rl-with-rm/conversation/x', kept)", kept)
    page.reload()
    expect(rewards(page)).to_have_count(1)


def copied(page):
    page.get_by_label(re.compile("^(Copy|Copied) message$")).last.click()
    return page.evaluate("navigator.clipboard.readText()")


def test_a_reply_is_shown_as_markdown_and_copied_as_it_was_written(open_page):
    page = open_page()
    show_reply(page, MARKDOWN)
    reply = replies(page).locator(".md").first
    expect(reply.locator("h1")).to_have_text("Bread")
    expect(reply.locator("strong")).to_have_text("Knead")
    expect(reply.locator("td")).to_have_text(["500 g", "350 g"])
    expect(reply.locator(".katex")).to_have_count(2)
    expect(reply).to_contain_text("costs $5 or $6")
    assert reply.locator("a").get_attribute("href") == "https://example.org/?a=1&b=2&copy=3"
    code = 'if a < b and "&lt;" != "<b>":\n    print("rise")'
    assert reply.locator("pre code").inner_text().strip() == code
    assert reply.locator(":not(pre) > code").inner_text() == "x<b>y &amp;"
    reply.locator("button.copy_code_button").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == code
    assert copied(page).strip() == MARKDOWN
    picture(page, "markdown")
    open_settings(page)
    page.get_by_label("Plain text").check()
    expect(reply).to_contain_text("**Knead**")
    assert reply.inner_text() == MARKDOWN
    assert copied(page).strip() == MARKDOWN
    page.get_by_label("Plain text").uncheck()
    expect(reply.locator("strong")).to_have_text("Knead")


def test_a_hostile_reply_brings_neither_html_nor_scripts_nor_remote_images(open_page):
    page = open_page()
    show_reply(page, ATTACK)
    reply = replies(page).locator(".md").first
    for plain in (False, True):
        if plain:
            open_settings(page)
            page.get_by_label("Plain text").check()
            expect(reply).to_contain_text("```mermaid")
            assert reply.inner_text() == ATTACK
        bad = "img, b, svg:not(button svg, .katex svg), script, iframe, style, form, input, .mermaid"
        assert reply.locator(bad).evaluate_all("found => found.map(element => element.outerHTML)") == []
        for link in reply.locator("a").all():
            assert re.match(r"https?://|#|$", link.get_attribute("href") or ""), link.evaluate("link => link.outerHTML")
        handlers = (
            "found => found.filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).map(e => e.outerHTML)"
        )
        assert reply.locator("*").evaluate_all(handlers) == []
        assert page.title() != "owned"
        assert copied(page).strip() == ATTACK


def test_a_message_can_be_edited_as_it_was_written(open_page):
    page = open_page()
    ask(page, HOSTILE)
    page.get_by_label("Edit").first.click()
    box = page.locator("textarea.edit-textarea")
    expect(box).to_have_value(HOSTILE)
    assert box.bounding_box()["width"] > 500
    box.fill("Is <i>rye</i> bread?")
    page.get_by_label("Submit", exact=True).first.click()
    expect(page.locator("#chat .user.message")).to_contain_text("Is <i>rye</i> bread?")
    expect(rewards(page)).to_have_count(1)
    expect(page.locator("#chat .user.message")).to_have_count(1)


def test_retry_writes_another_reply_and_undo_gives_the_message_back(open_page):
    page = open_page()
    ask(page, QUESTION)
    first = replies(page).locator(".md").first.inner_text()
    page.get_by_label("Retry").last.click()
    options = page.locator("#chat .option, #chat button.option")
    expect(options).to_have_count(2)
    assert replies(page).locator(".md").first.inner_text() != first
    options.filter(has_not_text=", shown").click()  # the reply that was replaced
    expect(replies(page).locator(".md").first).to_have_text(first)
    expect(rewards(page)).to_have_count(1)
    page.get_by_label("Undo").last.click()
    expect(replies(page)).to_have_count(0)
    expect(message_box(page)).to_have_value(QUESTION)


def test_the_best_of_four_is_shown_and_the_others_are_one_click_away(open_page):
    page = open_page()
    set_slider(page, "Best of N", 4)
    ask(page, QUESTION)
    options = page.locator("#chat .option, #chat button.option")
    expect(options).to_have_count(4)
    values = [float(re.search(r"of 4, ([+-]\d+\.\d+),", text).group(1)) for text in options.all_inner_texts()]
    assert values == sorted(values, reverse=True)
    expect(rewards(page)).to_have_text(
        re.compile(
            rf"^reward {re.escape(f'{values[0]:+.3f}')} · 1st of 4 replies to this prompt · P\(better than the runner"
        )
    )
    expect(options.first).to_contain_text(", shown")
    picture(page, "best-of-4")
    options.last.click()
    expect(rewards(page)).to_contain_text(
        f"{values[3]:+.3f} · 4th of 4 replies to this prompt · P(better than the best)"
    )
    expect(options.last).to_contain_text(", shown")
    expect(options.first).to_contain_text(f"1st of 4, {values[0]:+.3f}")


def test_conversations_are_saved_in_the_browser_and_found_again(open_page):
    page = open_page()
    ask(page, "The first talk")
    page.get_by_label("Toggle Sidebar").click()
    page.locator("#new-chat").click()
    expect(replies(page)).to_have_count(0)
    ask(page, "The second talk")
    wait_until_saved(page, 2)
    page.reload()
    expect(page.locator("#chat .user.message")).to_have_text(re.compile("The second talk"))
    expect(rewards(page)).to_have_count(1)
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_role("radio", name="The first talk").click()
    expect(page.locator("#chat .user.message")).to_have_text(re.compile("The first talk"))
    ask(page, "Still the first", count=2)
    page.get_by_role("button", name="Delete this chat").click()
    expect(page.get_by_role("radio")).to_have_count(1)
    expect(replies(page)).to_have_count(0)
    page.reload()
    expect(page.locator("#chat .user.message")).to_have_text(re.compile("The second talk"))
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_role("button", name="Undo: bring back “The first talk”").click()
    expect(page.locator("#chat .user.message").last).to_have_text(re.compile("Still the first"))
    expect(page.get_by_role("radio")).to_have_count(2)
    expect(page.locator("#restore-chat")).to_be_hidden()
    page.reload()
    expect(page.locator("#chat .user.message").last).to_contain_text(re.compile("Still the first|The second talk"))


def test_chats_are_renamed_and_searched_for(open_page):
    page = open_page()
    page.get_by_label("Toggle Sidebar").click()
    ask(page, "Rye or wheat?", length=8)
    page.locator("#new-chat").click()
    expect(replies(page)).to_have_count(0)
    ask(page, "What is a prime number?", length=8)
    rename = page.locator("#rename-chat textarea, #rename-chat input")
    rename.fill("Mathematics")
    rename.press("Enter")
    expect(page.get_by_role("radio", name="Mathematics")).to_be_checked()
    expect(rename).to_have_value("")
    ask(page, "And a square?", count=2, length=8)  # the name stays
    expect(page.get_by_role("radio")).to_have_count(2)
    search = page.locator("#search-chats textarea, #search-chats input")
    wait_until_saved(page, 3)
    page.get_by_role("radio", name="Rye").click()
    expect(page.locator("#chat .user.message").first).to_have_text(re.compile("Rye"))
    search.fill("SQUARE")
    expect(page.get_by_role("radio", name="Mathematics")).to_be_visible()
    expect(page.get_by_role("radio")).to_have_count(2)  # what is found, and the chat that is shown
    search.fill("rye or")
    expect(page.get_by_role("radio")).to_have_count(1)
    page.get_by_role("button", name="Delete this chat").click()
    expect(page.get_by_role("radio")).to_have_count(0)
    search.fill("")
    expect(page.get_by_role("radio")).to_have_count(1)
    page.reload()
    page.get_by_label("Toggle Sidebar").click()
    expect(page.get_by_role("radio", name="Mathematics")).to_be_checked()


def test_all_chats_are_exported_as_lines_that_can_be_scored(open_page, reward_checkpoint, run_script, tmp_path):
    page = open_page()
    ask(page, QUESTION, length=8)
    page.get_by_label("Retry").last.click()
    expect(page.locator("#chat .option")).to_have_count(2)
    shown = float(re.search(r"[+-]\d+\.\d+", rewards(page).inner_text()).group())
    wait_until_saved(page, 1)
    page.get_by_label("Toggle Sidebar").click()
    with page.expect_download() as download:
        page.locator("#export-chats").click()
    assert download.value.suggested_filename == "chats.jsonl"
    exported = tmp_path / "chats.jsonl"
    download.value.save_as(exported)
    result = run_script("eval_rm.py", "--model", reward_checkpoint, "--score", exported)
    (row,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(row["rewards"]) == 2 and row["rewards"][0] == pytest.approx(shown, abs=2e-3)


def test_a_chat_deleted_in_the_middle_of_a_reply_stays_deleted(open_page):
    page = open_page()
    page.get_by_label("Toggle Sidebar").click()
    send(page, QUESTION, length=1900)
    wait_for_words(page)
    expect(page.get_by_role("radio")).to_have_count(1)
    page.get_by_role("button", name="Delete this chat").click()
    expect(replies(page)).to_have_count(0)
    expect(page.get_by_role("radio")).to_have_count(0)
    page.wait_for_timeout(1500)
    expect(page.get_by_role("radio")).to_have_count(0)
    page.locator("#restore-chat").click()
    expect(page.locator("#chat .user.message")).to_contain_text(QUESTION)
    expect(replies(page).last).to_contain_text("stopped early")


def test_a_new_chat_in_the_middle_of_a_reply_stays_empty_and_the_partial_reply_is_saved(open_page):
    page = open_page()
    page.get_by_label("Toggle Sidebar").click()
    send(page, QUESTION, length=1900)
    wait_for_words(page)
    page.wait_for_timeout(500)
    page.locator("#new-chat").click()
    expect(replies(page)).to_have_count(0)
    page.wait_for_timeout(1500)
    expect(replies(page)).to_have_count(0)
    page.get_by_role("radio", name=QUESTION).click()
    expect(rewards(page)).to_have_count(1)
    assert len(replies(page).first.inner_text()) > 20


def test_a_page_reloaded_in_the_middle_of_a_reply_keeps_the_question_and_frees_the_model(open_page):
    page = open_page()
    send(page, QUESTION, length=1900)
    page.wait_for_function("Object.keys(localStorage).some(key => key.startsWith('rl-with-rm/'))")
    expect(replies(page)).to_have_count(1)
    page.reload()
    expect(page.locator("#chat .user.message")).to_have_text(re.compile(QUESTION[:20]))
    ask(page, "And now?", length=8)


def test_a_busy_tab_that_is_hidden_and_shown_again_gets_the_whole_reply(open_page):
    page = open_page(hiding=True)
    for count in (1, 2):
        ask(page, QUESTION, count, length=200)


def test_a_message_sent_during_a_reply_stays_in_the_box(open_page):
    page = open_page()
    send(page, QUESTION, length=1900)
    wait_for_words(page)
    message_box(page).fill("Second while busy")
    message_box(page).press("Enter")
    expect(page.locator(".toast-body")).to_contain_text("a reply is being written")
    expect(message_box(page)).to_have_value("Second while busy")
    page.locator("#message button.stop-button").click()
    expect(rewards(page)).to_have_count(1)
    expect(page.locator("#chat .user.message")).to_have_count(1)


def test_a_retry_or_edit_that_is_refused_drops_nothing(open_page):
    page = open_page()
    ask(page, QUESTION)
    reply = page.locator("#chat .bot .md").first.inner_text()
    set_slider(page, "Max new tokens", 5000)
    page.get_by_label("Retry").last.click()
    expect(page.locator(".toast-body")).to_contain_text("too long")
    expect(page.locator("#chat .bot .md").first).to_have_text(reply, use_inner_text=True)
    page.wait_for_timeout(300)  # the conversation is shown once more
    page.get_by_label("Edit").first.click()
    page.locator("textarea.edit-textarea").fill("   ")
    page.get_by_label("Submit", exact=True).first.click()
    expect(page.locator(".toast-body").last).to_contain_text("the message is empty")
    expect(page.locator("#chat .user.message")).to_contain_text(QUESTION)
    expect(page.locator("#chat .bot .md").first).to_have_text(reply, use_inner_text=True)


def test_junk_in_the_browsers_storage_hides_no_conversation(open_page):
    page = open_page()
    ask(page, "A good talk")
    wait_until_saved(page, 1)
    for junk in ("{}", "5", "[]", '"x"', "not JSON", '{"conversation": {"id": 1}}'):
        page.evaluate("junk => localStorage.setItem('rl-with-rm/conversation/junk', junk)", junk)
        page.reload()
        expect(page.locator("#chat .user.message")).to_have_text(re.compile("A good talk"))


def test_a_conversation_continued_in_two_tabs_becomes_two(open_page):
    one = open_page()
    ask(one, "The start")
    other = one.context.new_page()
    other.goto(one.url)
    expect(other.locator("#chat .user.message")).to_have_count(1)
    ask(other, "From the other tab", count=2)
    ask(one, "From this tab", count=2)
    one.get_by_label("Toggle Sidebar").click()
    expect(one.get_by_role("radio")).to_have_count(2)
    texts = one.evaluate("Object.values(localStorage).join()")
    assert "From the other tab" in texts and "From this tab" in texts
    one.get_by_role("button", name="Delete this chat").click()  # this tab's, not the other's
    expect(one.get_by_role("radio")).to_have_count(1)
    saved = (
        "Object.keys(localStorage).filter(key => key.includes('/conversation/')).map(key => localStorage[key]).join()"
    )
    texts = one.evaluate(saved)
    assert "From the other tab" in texts and "From this tab" not in texts


def test_two_tabs_do_not_overwrite_each_others_conversations(open_page):
    one = open_page()
    other = one.context.new_page()
    other.goto(one.url)
    ask(other, "In the other tab")
    ask(one, "In this tab")
    one.reload()
    one.get_by_label("Toggle Sidebar").click()
    expect(one.get_by_role("radio")).to_have_count(2)


def test_a_refused_message_stays_in_the_box_and_says_why(open_page):
    page = open_page()
    set_slider(page, "Max new tokens", 2040)
    message_box(page).fill(QUESTION)
    message_box(page).press("Enter")
    expect(page.locator(".toast-body")).to_contain_text("the model's limit is 2,048")
    expect(message_box(page)).to_have_value(QUESTION)
    ask(page, QUESTION)


# ---------------------------------------------------------------------------------------------------------------------
# Compare and models
# ---------------------------------------------------------------------------------------------------------------------


VERDICT = re.compile(r"The reward model prefers [AB] with probability (over )?\d+\.\d%")


def open_words(page):
    page.get_by_role("button", name="Reward word by word").click()


def fill_comparison(page, prompt=QUESTION):
    page.get_by_role("tab", name="Compare").click()
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#reply-A textarea").fill("Knead the dough <b>until</b> it is smooth.")
    page.locator("#reply-B textarea").fill("You are too lazy to bake.")


def write_both(page, length):
    set_slider(page, "Max new tokens", length)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#prompt textarea").fill(QUESTION)
    page.locator("#write-both").click()


def test_two_replies_are_compared_and_voted_on(open_page, server):
    page = open_page()
    fill_comparison(page)
    page.locator("#compare").click()
    expect(page.locator("#verdict")).to_contain_text(VERDICT)
    before = server.votes_file.read_text().count("\n") if server.votes_file.exists() else 0
    page.locator("#vote-b").click()
    expect(page.locator("#saved")).to_contain_text(f"row {before + 1} of")
    row = json.loads(server.votes_file.read_text().splitlines()[-1])
    assert row["prompt"] == [{"role": "user", "content": QUESTION}] and row["vote"] == "b"
    assert row["chosen"][0]["content"] == "You are too lazy to bake."
    assert row["rejected"][0]["content"] == "Knead the dough <b>until</b> it is smooth."
    assert row["blind"] is False  # the verdict was shown first
    page.locator("#vote-b").click()
    expect(page.locator(".toast-body").last).to_contain_text("saved already")
    assert server.votes_file.read_text().count("\n") == before + 1


def test_a_pair_of_the_demos_is_compared_token_by_token(open_page, demo_folder):
    pairs = [json.loads(line) for line in (demo_folder[1] / "test.jsonl").read_text().splitlines()]
    pair = next(pair for pair in pairs if pair["kind"] == "polite" and len(pair["chosen"]) < 250)
    prompt, _, chosen = pair["chosen"].rpartition("\n\nAssistant: ")
    page = open_page()
    fill_comparison(page, prompt.strip())
    page.locator("#reply-A textarea").fill(chosen)
    page.locator("#reply-B textarea").fill(pair["rejected"].rpartition("\n\nAssistant: ")[2])
    page.locator("#compare").click()
    expect(page.locator("#verdict")).to_contain_text(VERDICT)
    open_words(page)
    expect(page.locator("#growth canvas, #growth svg").first).to_be_visible()
    assert page.locator("#words-A .words").inner_text() == chosen + "■"
    picture(page, "compare", full_page=True)


def test_the_comparison_says_that_the_chats_system_prompt_applies(open_page):
    page = open_page()
    open_settings(page)
    page.get_by_label("System prompt").fill("Be <b>kind</b>.")
    page.get_by_role("tab", name="Compare").click()
    expect(page.get_by_text("applies here too, and is saved with votes: Be <b>kind</b>.")).to_be_visible()


def test_the_model_writes_both_replies_and_they_are_compared_at_once_if_the_page_is_not_blind(open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#blind input").uncheck()
    page.get_by_role("tab", name="Chat").click()
    write_both(page, length=24)
    expect(page.locator("#verdict")).to_contain_text(VERDICT)
    expect(page.locator("#verdict")).to_contain_text("both: ")
    texts = [page.locator(f"#reply-{letter} textarea").input_value() for letter in "AB"]
    assert all(texts) and texts[0] != texts[1]


def test_coloured_words_keep_the_lines_and_characters_of_the_reply_and_a_probability_is_said_once(open_page):
    page = open_page()
    fill_comparison(page)
    reply = "First line.\n\n  - <b>an</b> item\n  - another\n\nLast & least: \U0001f642 é."
    page.locator("#reply-A textarea").fill(reply)
    page.locator("#compare").click()
    expect(page.locator("#verdict")).to_contain_text(VERDICT)
    assert page.locator("#verdict").inner_text().count("%") == 1 and "P(A" not in page.locator("#verdict").inner_text()
    expect(page.locator("#words-A")).to_be_hidden()  # who votes does not have to scroll past it
    open_words(page)
    expect(page.get_by_text("Only the reward at the end was trained.")).to_be_visible()
    assert page.locator("#words-A .words").inner_text() == reply + "■"
    assert "im_end" not in page.locator("#by-word").inner_text()
    assert page.locator("#words-A mark.up, #words-A mark.down").count() > 5


def test_the_note_on_a_saved_vote_goes_with_its_pair(open_page):
    page = open_page()
    for change in ("typing", "a new pair"):
        fill_comparison(page)
        page.locator("#reply-A textarea").fill(f"Before {change}.")
        page.locator("#vote-a").click()
        expect(page.locator("#saved")).to_contain_text("is saved")
        if change == "typing":
            page.locator("#reply-A textarea").press("End")
            page.locator("#reply-A textarea").type("!")
        else:
            page.locator("#write-both").click()
        expect(page.locator("#saved")).to_be_empty()


def test_a_verdict_disappears_when_its_texts_change(open_page):
    page = open_page()
    fill_comparison(page)
    page.locator("#compare").click()
    expect(page.locator("#verdict")).to_contain_text(VERDICT)
    page.locator("#reply-A textarea").press("End")
    page.locator("#reply-A textarea").type("!")
    expect(page.locator("#verdict")).not_to_contain_text(VERDICT)
    open_words(page)
    expect(page.locator("#growth")).to_be_hidden()
    expect(page.locator("#words-A")).to_be_empty()


def last_vote(server):
    return json.loads(server.votes_file.read_text(encoding="utf-8").splitlines()[-1])


def test_a_blind_vote_comes_before_verdict_and_names_and_is_counted(open_page, server):
    page = open_page()
    write_both(page, length=24)
    expect(page.locator("#vote-a")).to_be_enabled()
    page.wait_for_timeout(1000)
    expect(page.locator("#verdict")).to_be_empty()
    agreed, decided = agreement(page)
    page.locator("#vote-a").click()
    expect(page.locator("#verdict")).to_contain_text(VERDICT)
    expect(page.locator("#verdict")).to_contain_text("both: ")
    row = last_vote(server)
    model_agrees = row["shown"]["a"]["reward"] > row["shown"]["b"]["reward"]
    assert row["blind"] is True and row["vote"] == "a"
    assert agreement(page) == (agreed + model_agrees, decided + 1)
    texts = [row["chosen"][0]["content"], row["rejected"][0]["content"]]
    assert texts == [page.locator(f"#reply-{letter} textarea").input_value().strip() for letter in "AB"]
    assert row["shown"]["a"]["ending"] == row["shown"]["b"]["ending"] == "cut"
    assert row["shown"]["a"]["written_by"] == row["shown"]["b"]["written_by"] != None  # noqa: E711
    page.locator("#vote-b").click()
    expect(page.locator("#saved")).to_contain_text("“B is better” is saved")
    assert last_vote(server)["blind"] is False
    assert agreement(page) == (agreed + model_agrees, decided + 1)


def agreement(page):
    """(agreed, blind votes for one side) as the page says."""
    text = page.locator("#agreement").inner_text()
    found = re.search(r"agreed with ([\d,]+) of ([\d,]+) blind votes?: \d+% \(95% interval \d+% to \d+%\)", text)
    return tuple(int(number.replace(",", "")) for number in found.groups()) if found else (0, 0)


def test_a_stopped_reply_is_marked_in_the_votes_row_and_no_error_covers_it(open_page, server):
    page = open_page()
    write_both(page, length=1900)
    expect(page.locator("#reply-A textarea")).not_to_have_value("")
    expect(page.locator("#reply-B textarea")).not_to_have_value("")
    page.locator("#stop-writing").click()
    expect(page.locator("#vote-a")).to_be_enabled(timeout=5_000)
    expect(page.locator(".error:visible")).to_have_count(0)
    page.locator("#vote-tie").click()
    expect(page.locator("#verdict")).to_contain_text("A was stopped early · B was stopped early")
    assert [last_vote(server)["shown"][letter]["ending"] for letter in "ab"] == ["stopped", "stopped"]


def test_the_next_pair_is_proposed_and_can_be_voted_on(open_page, server, demo_folder):
    page = open_page()
    set_slider(page, "Max new tokens", 16)
    page.get_by_role("tab", name="Compare").click()
    for _ in range(2):
        before = page.locator("#reply-A textarea").input_value()
        page.locator("#next-pair").click()
        expect(page.locator("#reply-A textarea")).not_to_have_value(before)
        expect(page.locator("#vote-a")).to_be_enabled()
        expect(page.locator("#saved")).to_be_empty()
        page.locator("#vote-a").click()
        expect(page.locator("#verdict")).to_contain_text(VERDICT)
    assert last_vote(server)["prompt"][-1]["role"] == "user"
    known = (demo_folder[1] / "test.jsonl").read_text()
    assert json.dumps(last_vote(server)["prompt"][-1]["content"])[1:-1] in known


def test_a_proposal_that_is_stopped_leaves_the_pair_as_it_was(open_page):
    page = open_page()
    set_slider(page, "Max new tokens", 1900)
    fill_comparison(page)
    page.locator("#next-pair").click()
    expect(page.locator("#saved")).to_contain_text("Prompt 1 of 2: writing 4 replies")
    page.locator("#stop-writing").click()
    expect(page.locator("#vote-a")).to_be_enabled()
    expect(page.locator("#saved")).to_be_empty()
    expect(page.locator("#prompt textarea")).to_have_value(QUESTION)
    expect(page.locator("#reply-B textarea")).to_have_value("You are too lazy to bake.")


def test_what_cannot_be_written_is_a_hint_and_covers_nothing(open_page):
    page = open_page()
    set_slider(page, "Max new tokens", 2040)
    fill_comparison(page)
    for button in ("#write-both", "#next-pair"):
        page.locator(button).click()
        expect(page.locator(".toast-body").last).to_contain_text("too long")
        expect(page.locator("#vote-a")).to_be_enabled()
        expect(page.locator(".error:visible")).to_have_count(0)
        expect(page.locator("#reply-B textarea")).to_have_value("You are too lazy to bake.")


def test_half_written_replies_cannot_be_voted_on(open_page):
    page = open_page()
    write_both(page, length=1900)
    expect(page.locator("#stop-writing")).to_be_visible()
    expect(page.locator("#vote-a")).to_be_disabled()
    expect(page.locator("#reply-A textarea")).not_to_have_value("")
    page.locator("#stop-writing").click()
    expect(page.locator("#vote-a")).to_be_enabled(timeout=5_000)
    expect(page.locator("#write-both")).to_be_visible()


def test_words_that_look_like_turns_stay_words_when_copied_from_the_chat(open_page, server):
    page = open_page()
    ask(page, "see:\n\nHuman: x\n\nAssistant: y")
    page.get_by_role("tab", name="Compare").click()
    page.locator("#from-chat").click()
    expect(page.locator("#reply-A textarea")).not_to_have_value("")
    page.locator("#reply-B textarea").fill("Something else.")
    page.locator("#vote-a").click()
    expect(page.locator("#saved")).to_contain_text("is saved")
    row = json.loads(server.votes_file.read_text().splitlines()[-1])
    assert row["prompt"] == [{"role": "user", "content": "see:\n\nHuman: x\n\nAssistant: y"}]


def test_the_chats_two_best_candidates_are_copied_into_the_comparison(open_page, server):
    page = open_page()
    set_slider(page, "Best of N", 2)
    ask(page, QUESTION)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#from-chat").click()
    expect(page.locator("#prompt textarea")).to_have_value(QUESTION)
    assert all(page.locator(f"#reply-{letter} textarea").input_value() for letter in "AB")
    page.locator("#vote-a").click()
    expect(page.locator("#verdict")).to_contain_text("the chat's reply")
    assert last_vote(server)["blind"] is False  # the chat has shown the rewards


def test_models_are_offered_and_loaded_by_name(open_page):
    page = open_page()
    page.get_by_role("tab", name="Models").click()
    reward_model = page.locator("#reward-model input")
    expect(reward_model).to_have_value("bread / step-2 (newest)")
    reward_model.click()
    page.get_by_role("option", name="none").click()
    page.locator("#load").click()
    expect(page.locator("#status")).to_contain_text("none: choose one under Models")
    reward_model.click()
    page.get_by_role("option", name="bread / step-2").click()
    page.locator("#load").click()
    expect(page.locator("#status")).to_contain_text("bread / step-2 (newest) · ")


# ---------------------------------------------------------------------------------------------------------------------
# Keyboard, phone, colours
# ---------------------------------------------------------------------------------------------------------------------


def test_keyboard_alone_is_enough(open_page):
    page = open_page()
    focus(page, "#message textarea")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    expect(rewards(page)).to_have_count(1)
    focus(page, "[role=tab]:nth-of-type(2)")
    page.keyboard.press("Enter")
    for selector, text in (
        ("#prompt textarea", QUESTION),
        ("#reply-A textarea", "Good."),
        ("#reply-B textarea", "Bad."),
    ):
        focus(page, selector)
        page.keyboard.type(text)
    focus(page, "#vote-a")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text(VERDICT)
    focus(page, "#by-word button")
    page.keyboard.press("Enter")
    expect(page.locator("#words-A mark").first).to_be_visible()


def focus(page, selector):
    """Press Tab until the element has the focus."""
    for _ in range(60):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never reaches {selector}")


def test_nothing_is_wider_than_a_phone(open_page):
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    ask(page, QUESTION)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    picture(page, "phone")
    fill_comparison(page)
    page.locator("#compare").click()
    expect(page.locator("#verdict")).to_contain_text(VERDICT)
    bottom = page.locator("#reply-B").bounding_box()
    for vote in ("a", "b", "tie", "both_bad"):  # directly under the replies, above everything that is shown later
        box = page.locator(f"#vote-{vote}").bounding_box()
        assert 0 <= box["y"] - (bottom["y"] + bottom["height"]) < 160 and box["width"] > 120 and box["height"] > 30
    picture(page, "compare-phone")
    open_words(page)
    boxes = [page.locator(f"#words-{letter}").bounding_box() for letter in "AB"]
    assert boxes[0]["width"] > 250 and boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


CONTRAST = """element => {
  const numbers = color => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const over = (top, below, alpha) => below.map((value, index) => top[index] * alpha + value * (1 - alpha));
  let background = [255, 255, 255], opacity = 1;
  const chain = [];
  for (let node = element; node; node = node.parentElement) chain.unshift(node);
  for (const node of chain) {
    const style = getComputedStyle(node), color = numbers(style.backgroundColor);
    background = over(color, background, color[3] / 255);
    opacity *= style.opacity;
  }
  const ink = over(numbers(getComputedStyle(element).color), background, opacity);
  const light = color => color.slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const [low, high] = [light(ink), light(background)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""  # the contrast ratio of WCAG 2.1, section 1.4.3, which wants 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_in_both_colour_schemes(open_page, scheme):
    page = open_page(color_scheme=scheme)
    ask(page, QUESTION)
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    picture(page, f"chat-{scheme}")
    for selector in (
        "#chat .bot .md",
        "#chat small.footer",
        "#status dt",
        "#status dd",
        "#message textarea",
    ):
        ratio = page.locator(selector).first.evaluate(CONTRAST)
        assert ratio >= 4.5, (selector, ratio)
    for text in ("0 always takes the likeliest token", "Temperature", "Best of N"):
        ratio = page.get_by_text(text).first.evaluate(CONTRAST)
        assert ratio >= 4.5, (text, ratio)
