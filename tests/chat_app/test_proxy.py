"""The page behind nginx with the settings that docs/chat.md gives: it works, streams, and strangers stay out."""

import json
import re
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from tests.chat_app.conftest import PAGE_HOST
from tests.chat_server import free_port
from tests.conftest import ROOT

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(not (NGINX and OPENSSL), reason="no nginx or no openssl on this machine")
# one process of this user, which writes into its own folder only
AROUND = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events {}
http {
    access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    %s
}
"""
NO_BUFFERING = "proxy_buffering off;"


def documented_settings():
    text = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    return re.search(r"```nginx\n(.*?)```", text, re.DOTALL).group(1)


def replaced(text, old, new):
    assert text.count(old) == 1, f"docs/chat.md: {old!r}"
    return text.replace(old, new)


@pytest.fixture(scope="module", params=["as documented", "with buffering"])
def proxy(request, server, tmp_path_factory):
    """nginx with the documented settings on a free port of this machine: its https address."""
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    subprocess.run(
        [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={PAGE_HOST}",
         "-keyout", "page.key", "-out", "page.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    settings = replaced(documented_settings(), "listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;")
    settings = replaced(settings, f"/etc/ssl/certs/{PAGE_HOST}.pem", str(folder / "page.pem"))
    settings = replaced(settings, f"/etc/ssl/private/{PAGE_HOST}.key", str(folder / "page.key"))
    settings = replaced(settings, "http://127.0.0.1:7860", server.url.rstrip("/"))
    if request.param == "with buffering":  # as proxies come; the page itself asks them not to hold its streams back
        settings = replaced(settings, NO_BUFFERING, "")
    (folder / "nginx.conf").write_text(AROUND % settings)
    arguments = [NGINX, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    try:
        address = f"https://127.0.0.1:{port}/"
        for _ in range(100):
            if process.poll() is not None:
                raise AssertionError(process.stderr.read())
            try:
                assert ask(address).status == 200
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=10)


def ask(url, host=PAGE_HOST, origin=None, content=None):
    headers = {"Host": host, **({"Origin": origin} if origin else {}), "Content-Type": "application/json"}
    data = None if content is None else json.dumps(content).encode()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it signed its certificate itself
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60, context=context)


def test_a_reply_streams_through_the_proxy(proxy):
    arguments = {"data": ["What should I know about bread?", [], "", 0, 0.9, 600, False, 1]}
    event = json.load(ask(f"{proxy}gradio_api/call/chat", content=arguments))["event_id"]
    started, times = time.perf_counter(), []
    with ask(f"{proxy}gradio_api/call/chat/{event}") as stream:
        for line in stream:
            if line.startswith(b"event: generating"):
                times.append(time.perf_counter() - started)
    assert len(times) > 5
    assert times[0] < times[-1] / 3  # held back until it is complete, all of it would come at once


def test_strangers_stay_out_behind_the_proxy_too(proxy):
    for host, origin, wanted in (
        ("evil.example", None, 400),
        (PAGE_HOST, "https://evil.example", 403),
        (PAGE_HOST, f"https://{PAGE_HOST}", 200),
    ):
        try:
            assert ask(f"{proxy}gradio_api/info", host, origin).status == wanted
        except urllib.error.HTTPError as error:
            assert error.code == wanted


# of the reply, at each change of the page
NOTE_LENGTHS = """
() => {
  window.lengths = new Set();
  const length = () => [...document.querySelectorAll("#chat .bot .md")].reduce((n, one) => n + one.innerText.length, 0);
  new MutationObserver(() => window.lengths.add(length()))
    .observe(document.body, { subtree: true, childList: true, characterData: true });
}
"""


@pytest.mark.flaky(reruns=1)  # as those of test_app.py
def test_a_browser_gets_a_reply_piece_by_piece_through_the_proxy(proxy):
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    port = re.search(r":(\d+)/", proxy).group(1)
    problems = []
    with sync_api.sync_playwright() as playwright:
        resolve = f"--host-resolver-rules=MAP {PAGE_HOST} 127.0.0.1"
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", resolve]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_context(ignore_https_errors=True).new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.goto(f"https://{PAGE_HOST}:{port}/")
        page.locator("#message textarea").fill("What should I know about bread?")
        page.evaluate(NOTE_LENGTHS)
        page.locator("#message textarea").press("Enter")
        page.locator("#chat small.footer").wait_for()
        assert len(page.evaluate("[...window.lengths]")) > 3 and problems == []
        assert "reward" in page.locator("#chat small.footer").inner_text()
        browser.close()
