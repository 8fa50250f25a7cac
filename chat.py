"""Talk to a model in the browser, see what a reward model thinks of each reply, compare replies and vote.

python chat.py                                    the page, and a button that loads Qwen3-0.6B
python chat.py --model ./checkpoints/rm/RUN       the run's newest checkpoint scores, and its base model talks
python chat.py --model FOLDER_OR_HUB_ID --reward_model ./checkpoints/rm/RUN/step-500
python chat.py --demo                             the tiny built-in model and a reward model trained on its pairs
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import subprocess
import sys
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from chat_app import model_list
from checkpointing import resolve, run_folder
from checkpointing.run_folder import step_folders
from common import flags
from common.flags import flag
from utils import UserError

if TYPE_CHECKING:
    from chat_app import app as page
    from chat_app import chat_tab, engine
else:  # loaded when first used, so that --help answers at once
    page, chat_tab, engine = map(utils.lazy_import, ("chat_app.app", "chat_app.chat_tab", "chat_app.engine"))

DEMO_RUN = "demo-chat"


@dataclass(frozen=True)
class ChatConfig:
    """Every setting of the page."""

    # fmt: off
    model: str = flag(model_list.DEFAULT_MODEL, "who talks: hub id or folder, or a reward checkpoint for its base")
    reward_model: str | None = flag(None, "who scores: a reward checkpoint's folder, or its run's for the newest one")
    autoload: bool = flag(False, "load the default model at start too, without waiting for the button")
    output_dir: str = flag("./checkpoints/rm", "whose checkpoints the page offers")
    votes_file: str = flag("./preferences.jsonl", "JSONL file that votes go to; train_rm.py --dataset takes it")
    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0 lets the whole network in and wants --auth")
    port: int = flag(7860, "port; if it is taken and was not given, the next free one", minimum=1, below=65536)
    share: bool = flag(False, "a public address through Gradio's servers, for 7 days; wants --auth")
    auth: str | None = flag(None, "USER:PASS that visitors must give")
    demo: bool = flag(False, "the tiny built-in model and a reward model trained on its pairs, offline")
    debug: bool = flag(False, "show the traceback of an error")
    # fmt: on

    def problems(self) -> list[str]:
        """What no single field can tell is wrong."""
        found = []
        user, colon, password = (self.auth or "").partition(":")
        if self.auth is not None and not (user and colon and password):
            found.append("--auth: wants USER:PASS, both of them")
        if self.auth is None and self.share:
            found.append("--share: a public address without --auth USER:PASS would let everybody use this machine")
        if self.auth is None and not is_loopback(self.host):
            found.append(f"--host: {self.host} lets others in, and without --auth USER:PASS it would let in everybody")
        if self.demo and (self.reward_model or self.model != model_list.DEFAULT_MODEL):
            found.append("--demo: brings its own models; goes without --model and --reward_model")
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. A name counts as far as the system says where it leads."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---------------------------------------------------------------------------------------------------------------------
# Who may come in
# ---------------------------------------------------------------------------------------------------------------------


def own_names(host: str, share: bool) -> list[str]:
    """What a request's Host header may say; a page elsewhere that points its own name at this machine says another."""
    import psutil

    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    if not is_loopback(host):
        names |= {socket.gethostname(), socket.getfqdn()}
        names |= {address.address.split("%")[0] for found in psutil.net_if_addrs().values() for address in found}
    if share:
        names.add("*.gradio.live")
    return sorted(f"[{name}]" if ":" in name else name for name in names)  # as IPv6 addresses stand in a header


class Guard:
    """ASGI middleware: no other site's page may ask this one anything, and this one asks nobody else.

    Gradio itself takes requests from any site where it does not listen at 127.0.0.1, and stores files that anybody
    uploads, which nothing on this page does.
    """

    POLICY = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    )

    def __init__(self, app: Any, allowed_hosts: list[str]):
        self.app, self.allowed_hosts = app, allowed_hosts

    def refuses(self, scope: Any) -> bool:
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        hosts = [(urllib.parse.urlsplit(origin).hostname or "").lower() for origin in origins]
        names = [name.strip("[]") for name in self.allowed_hosts]
        is_foreign = not all(host in names or f"*.{host.partition('.')[2]}" in names for host in hosts)
        return is_foreign or scope["path"].rstrip("/").endswith("/upload")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.refuses(scope):
            from starlette.responses import PlainTextResponse

            return await PlainTextResponse("refused: not from this page", status_code=403)(scope, receive, send)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = {
                    b"content-security-policy": self.POLICY.encode(),
                    b"x-content-type-options": b"nosniff",
                    b"referrer-policy": b"no-referrer",
                }
                message = {**message, "headers": [*message["headers"], *headers.items()]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def free_port(host: str, first: int, last: int) -> int:
    """The first port of a range that nobody listens at."""
    for port in range(first, last + 1):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself will
                probe.bind(address)
            return port
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"--host {host} is no address of this machine", found=error) from error
            found = error.strerror
    ports = f"--port {first} is" if first == last else f"ports {first} to {last} are"
    raise UserError(f"{ports} taken", where=host, found=found, next="another --port, or none for the next free one")


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


def demo_models(output_dir: Path) -> tuple[str, Path]:
    """The demo's model and a reward model trained on its pairs, which takes a minute the first time."""
    from data_pipeline import demo

    run = output_dir / DEMO_RUN
    if not is_finished(run):
        print("training the demo's reward model, about a minute, once", flush=True)
        begin = ["--demo", "--run_name", DEMO_RUN, "--output_dir", str(output_dir)]
        flags_of_training = ["--resume_from", str(run)] if step_folders(run) else begin
        train = str(Path(__file__).with_name("train_rm.py"))
        code = subprocess.run([sys.executable, train, *flags_of_training]).returncode
        if code:
            raise UserError("the demo's reward model could not be trained", where=run, next="see the message above")
    model, _ = demo.write_demo(Path("demo"))
    return str(model), resolve.sound_checkpoint(str(run))


def is_finished(run: Path) -> bool:
    """Whether a run's own record says that it trained to its end."""
    try:
        record = run_folder.read_record(run)
    except (OSError, ValueError):
        return False
    return record is not None and record.state == run_folder.FINISHED and bool(step_folders(run))


def serve(config: ChatConfig, built: Any, port: int) -> None:
    """Open the page to whom the settings let in, until Ctrl-C."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = own_names(config.host, config.share)
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
        Middleware(Guard, allowed_hosts=names),
    ]
    user, _, password = (config.auth or "").partition(":")
    built.launch(
        server_name=config.host,
        server_port=port,
        share=config.share,
        auth=(user, password) if config.auth else None,
        quiet=True,
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
        prevent_thread_lock=True,
        max_file_size="1mb",
        css=page.STYLE,
        head=chat_tab.SCRIPT,
        app_kwargs={"middleware": middleware},
    )
    if config.share and not built.share_url:
        raise utils.DiskOrNetworkError(
            "no public address could be had from Gradio's servers",
            safe=f"the page itself works: without --share it is at {built.local_url}",
            next="try again later, or --host 0.0.0.0 --auth USER:PASS for your own network",
        )
    for address in filter(None, (built.local_url, built.share_url)):
        print(f"open {address}   (Ctrl-C stops)", flush=True)
    while True:  # not launch's own wait: that one swallows Ctrl-C
        time.sleep(3600)


def main(argv: list[str]) -> None:
    given, problems = flags.read_flags(ChatConfig, argv, __doc__.split("\n\n")[0])
    config = flags.build_config(ChatConfig, given, problems)
    port = free_port(config.host, config.port, config.port if "port" in given else config.port + 99)
    output_dir = Path(config.output_dir)
    if config.demo:
        talker, scorer = demo_models(output_dir)
    else:
        talker, scorer = model_list.choose_models(config.model, config.reward_model)
    on_stage = engine.Stage(talker, scorer, output_dir, config.debug)
    if config.autoload or config.demo or "model" in given or "reward_model" in given:
        print(f"loading {on_stage.talker}", flush=True)
        on_stage.load()
    built = page.build_page(on_stage, Path(config.votes_file))
    try:
        serve(config, built, port)
    finally:
        built.close(verbose=False)


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
