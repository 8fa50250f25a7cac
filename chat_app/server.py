"""Who may connect to the page: which addresses, hosts and origins are let in, and the server's port."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from utils import DiskOrNetworkError, UserError

if TYPE_CHECKING:
    import gradio as gr

STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page_head.html"))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only. Of names, only "localhost" counts."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_names(host: str, share: bool) -> list[str]:
    """The Host headers to accept. A foreign page that points its own domain at this machine sends another one."""
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    if not is_loopback(host):
        names |= {socket.gethostname(), socket.getfqdn()}
        names |= {
            address.address.split("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses
        }
    if share:
        names.add("*.gradio.live")
    return sorted(f"[{name}]" if ":" in name else name for name in names)  # headers put IPv6 addresses in brackets


class Guard:
    """ASGI middleware: no other site's page can call this server, and this page loads nothing from elsewhere.

    Gradio itself accepts requests from any origin unless it listens at 127.0.0.1, and stores whatever is uploaded,
    which nothing on this page needs.
    """

    POLICY = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    )
    HEADERS = (
        (b"content-security-policy", POLICY.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(self, app: Any, allowed_hosts: list[str]):
        self.app = app
        self.names = [name.strip("[]") for name in allowed_hosts]

    def is_refused(self, scope: Any) -> bool:
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        hosts = [(urllib.parse.urlsplit(origin).hostname or "").lower() for origin in origins]
        is_foreign = not all(host in self.names or f"*.{host.partition('.')[2]}" in self.names for host in hosts)
        return is_foreign or scope["path"].rstrip("/").endswith("/upload")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.is_refused(scope):
            return await PlainTextResponse("refused: not from this page", status_code=403)(scope, receive, send)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def free_port(host: str, first: int, last: int) -> int:
    """The first port from `first` to `last` that is not in use; UserError if there is none."""
    for port in range(first, last + 1):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself will
                probe.bind(address)
            return port
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"--host {host} is not an address of this machine", found=error) from error
            found = error.strerror
    ports = f"--port {first} is" if first == last else f"ports {first} to {last} are"
    raise UserError(
        f"{ports} taken", where=host, found=found, next="another --port, or leave it out to use the next free one"
    )


def launch(page: gr.Blocks, host: str, port: int, share: bool, auth: str | None) -> None:
    """Serve the page from threads of this process, and print its addresses. `auth` is USER:PASSWORD or None."""
    names = own_names(host, share)
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
        Middleware(Guard, allowed_hosts=names),
    ]
    user, _, password = (auth or "").partition(":")
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=(user, password) if auth else None,
        quiet=True,
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
        prevent_thread_lock=True,
        max_file_size="1mb",
        css_paths=STYLE,
        head_paths=SCRIPT,
        app_kwargs={"middleware": middleware},
    )
    if share and not page.share_url:
        raise DiskOrNetworkError(
            "Gradio's servers gave no public address",
            safe=f"the page itself works: without --share it is at {page.local_url}",
            next="try again later, or use --host 0.0.0.0 --auth USER:PASS for your own network",
        )
    for address in filter(None, (page.local_url, page.share_url)):
        print(f"open {address}   (Ctrl-C stops)", flush=True)


def wait_for_ctrl_c() -> None:
    while True:  # Gradio's own way of waiting swallows Ctrl-C
        time.sleep(3600)
