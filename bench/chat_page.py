"""How quickly the chat page starts, opens, replies, scores, stops and rejects; prints a table with the goals.

    python bench/chat_page.py MODEL_FOLDER REWARD_CHECKPOINT

The rows of the page itself need Playwright and Chromium.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from gradio_client import Client
from gradio_client.exceptions import AppError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chat_app import engine  # noqa: E402

PORT = 7899
QUESTION = "What should I know about bread?"
TIMES = 5


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def start(model: str, reward_model: str) -> tuple[subprocess.Popen, float]:
    """Start the server; returns its process and the seconds until it answered."""
    command = [sys.executable, str(ROOT / "chat.py"), "--model", model, "--reward_model", reward_model]
    started = time.perf_counter()
    votes = Path(tempfile.mkdtemp()) / "preferences.jsonl"
    process = subprocess.Popen([*command, "--port", str(PORT), "--votes_file", str(votes)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=5):
                return process, time.perf_counter() - started
        except OSError:
            time.sleep(0.05)
    raise SystemExit("chat.py ended; see its message above")


def measure_in_a_browser() -> dict[str, float]:
    """Seconds until one can type, and from Enter to the first words of the reply; empty without a browser."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        return {}
    if chromium is None:
        return {}
    opening, first_words = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        for _ in range(TIMES):
            started = time.perf_counter()
            page.goto(f"http://127.0.0.1:{PORT}/")
            page.wait_for_selector("#message textarea")
            opening.append(time.perf_counter() - started)
            page.wait_for_timeout(1500)
            page.fill("#message textarea", QUESTION)
            started = time.perf_counter()
            page.press("#message textarea", "Enter")
            page.wait_for_selector("#chat .bot .md")
            first_words.append(time.perf_counter() - started)
            page.click("#message .stop-button")
            page.wait_for_selector("#chat small.footer")
            page.evaluate("localStorage.clear()")
        browser.close()
    return {"the page is usable": statistics.median(opening), "first token": statistics.median(first_words)}


def share_of_the_reward(model: str, reward_model: str) -> float:
    """Time to score a reply, relative to writing it, both in this process."""
    chat_engine = engine.ChatEngine(model, Path(reward_model))
    chat_engine.load()
    shares = []
    for _ in range(TIMES + 1):
        question = [{"role": "user", "content": QUESTION}]
        started = time.perf_counter()
        (reply,) = list(chat_engine.generate(question, engine.Settings(max_new_tokens=100, temperature=1.0)))[-1]
        written = time.perf_counter()
        chat_engine.rewards_of([[*question, {"role": "assistant", "content": reply.content}]])
        shares.append((time.perf_counter() - written) / (written - started))
    return statistics.median(shares[1:])  # the first one warms up


def measure(client: Client) -> dict[str, float]:
    """Medians, in seconds."""

    def chat(**options):
        return client.submit(
            **{"message": QUESTION, "max_new_tokens": 100, "temperature": 1.0, **options}, api_name="/chat"
        )

    def refuse_a_megabyte():
        try:
            client.predict(f"{QUESTION} " * 32_768, api_name="/chat")
        except AppError:
            return
        raise SystemExit("a megabyte was not refused")

    def stop():
        job = chat(max_new_tokens=1900)
        next(iter(job), None)
        job.cancel()
        started = time.perf_counter()
        next(iter(chat()), None)  # the next one is only begun when the first has stopped
        return time.perf_counter() - started

    chat(max_new_tokens=4).result()
    return {
        "a megabyte refused": statistics.median(seconds(refuse_a_megabyte) for _ in range(TIMES)),
        "stop, and the next one begins": statistics.median(stop() for _ in range(TIMES)),
    }


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    process, first_answer = start(*sys.argv[1:])
    try:
        found = {"the server answers": first_answer} | measure_in_a_browser()
        found |= measure(Client(f"http://127.0.0.1:{PORT}/", verbose=False))
    finally:
        process.terminate()
        process.wait()
    found["share of the reward"] = share_of_the_reward(*sys.argv[1:])
    wanted = {"the server answers": 12, "the page is usable": 2, "first token": 0.5, "share of the reward": 0.1,
              "a megabyte refused": 1, "stop, and the next one begins": 1}  # fmt: skip
    print("| what | measured | wanted, at most |\n|---|---|---|")
    for name, limit in wanted.items():
        value = found.get(name)
        unit = "" if name.startswith("share") else " s"
        print(f"| {name} | {'no browser' if value is None else f'{value:.2f}{unit}'} | {limit}{unit} |")


if __name__ == "__main__":
    main()
