"""Who may connect to the page: which addresses, hosts and origins are let in, and the server's port."""

import contextlib
import errno
import ipaddress
import itertools
import re
import socket
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from utils import DiskOrNetworkError, UserError

# No other host may serve anything to the page.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine. The only name that counts is "localhost"."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_host_name(text: str) -> bool:
    """Whether a text is a host's name or address alone. A name with "*" would let in hosts of anybody's choice."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(text.strip("[]")))
    return re.fullmatch(r"[\w-]{1,63}(\.[\w-]{1,63})*", text) is not None


def own_names(host: str, share: bool, page_hosts: Sequence[str] = ()) -> list[str]:
    """The Host headers to accept, in lower case as browsers send them. `page_hosts` are names given by the user.

    A malicious site may point its own domain at this machine (DNS rebinding); its requests then carry that domain.
    """
    names = {"localhost", "127.0.0.1", "::1", host}
    names |= {name.strip("[]").encode("idna").decode() for name in page_hosts}
    if not is_loopback(host):
        addresses = itertools.chain.from_iterable(psutil.net_if_addrs().values())
        names |= {socket.gethostname(), socket.getfqdn(), *(found.address.split("%")[0] for found in addresses)}
    if share:
        names.add("*.gradio.live")
    # headers put IPv6 addresses in brackets
    return sorted(f"[{name}]" if ":" in name else name for name in map(str.lower, names))


class Guard:
    """ASGI middleware: other sites' pages cannot call this server, and this page loads nothing from elsewhere.

    Gradio accepts requests from any origin unless it listens at 127.0.0.1. It also stores every upload, and this page
    has no use for uploads.
    """

    def __init__(self, app: Any, allowed_hosts: list[str]):
        self.app = app
        self.names = [name.strip("[]") for name in allowed_hosts]

    def is_refused(self, scope: Any) -> bool:
        hosts = [urllib.parse.urlsplit(origin).hostname or "" for origin in Headers(scope=scope).getlist("origin")]
        is_foreign = not all(host in self.names or f"*.{host.partition('.')[2]}" in self.names for host in hosts)
        return is_foreign or scope["path"].rstrip("/").endswith("/upload")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.is_refused(scope):
            return await PlainTextResponse("refused: not from this page", status_code=403)(scope, receive, send)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if headers.get("content-type", "").startswith("text/event-stream"):
                    headers["x-accel-buffering"] = "no"  # a proxy would hold a reply back until it is complete
            await send(message)

        await self.app(scope, receive, send_with_headers)


def free_port(host: str, first: int, last: int) -> int:
    """The first port from `first` to `last` that is not in use; UserError if there is none."""
    for port in range(first, last + 1):
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            socket.create_server(address, family=family).close()
            return port
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"--host {host} is not an address of this machine", found=error, next="leave --host out, or 0.0.0.0"
                ) from error
            found = error.strerror
    ports = f"--port {first} is" if first == last else f"ports {first} to {last} are"
    raise UserError(f"{ports} taken", where=host, found=found, next="another --port, or none to use a free one")


def launch(page: Any, host: str, port: int, share: bool, auth: str | None, page_hosts: Sequence[str] = ()) -> None:
    """Serve a gr.Blocks from threads of this process, and print its addresses. `auth` is USER:PASSWORD or None."""
    names = own_names(host, share, page_hosts)
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
        Middleware(Guard, allowed_hosts=names),
    ]
    user, _, password = (auth or "").partition(":")
    folder = Path(__file__).parent
    page.launch(
        server_name=host, server_port=port, share=share, auth=(user, password) if auth else None,
        css_paths=folder / "page.css", head_paths=folder / "page_head.html", footer_links=["api"],
        quiet=True, ssr_mode=False, run_history=False, prevent_thread_lock=True, max_file_size="1mb",
        app_kwargs={"middleware": middleware},
    )  # fmt: skip
    if share and not page.share_url:
        raise DiskOrNetworkError(
            "Gradio's servers gave no public address",
            safe=f"the page itself works at {page.local_url} if you leave out --share",
            next="try again later, or use --host 0.0.0.0 --auth USER:PASS for your own network",
        )
    for address in filter(None, (page.local_url, page.share_url)):
        print(f"open {address}   (Ctrl-C stops)", flush=True)
    if page_hosts and not auth:
        print(
            f"whoever reaches {', '.join(page_hosts)} can use this page, unless its proxy or --auth asks for a password"
        )


def wait_for_ctrl_c() -> None:
    while True:  # Gradio's own wait swallows Ctrl-C
        time.sleep(3600)
