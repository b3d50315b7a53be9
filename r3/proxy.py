"""Requests by HTTP with the standard library, and the proxy of the environment that may stand between.

`http_proxy`, `https_proxy` and `no_proxy` are read as the standard library reads them, in either case of letters. This
machine itself (127.0.0.1, ::1, localhost, 0.0.0.0) is asked directly: no proxy leads to it.
"""

import ipaddress
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from r3.config import variables
from r3.errors import R3Error


def open_url(request: urllib.request.Request, timeout_s: float) -> Any:
    """What `urllib.request.urlopen` returns and raises, by the proxy that the environment has now."""
    direct = [urllib.request.ProxyHandler({})] if is_this_machine(request.full_url) else []
    return urllib.request.build_opener(*direct).open(request, timeout=timeout_s)


def is_this_machine(url: str) -> bool:
    """Whether the URL's host is a loopback address, or a name or an unspecified address that stands for one."""
    host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def proxy_of(url: str) -> str | None:
    """The proxy through which `open_url` asks for `url`, with the variable that names it; None if it asks directly."""
    return None if is_this_machine(url) else _of_environment(url, ())


def proxy_of_others(url: str) -> str | None:
    """The same for other clients (of OpenAI, httpx, requests, curl): they also read `all_proxy`, and know no exception
    for this machine."""
    return _of_environment(url, ("all",))


def no_proxy_for(url: str) -> str:
    """What to set so that `url` is asked directly."""
    hosts = [urllib.parse.urlsplit(url).hostname or ""]
    hosts += [host for host in ("127.0.0.1", "localhost") if is_this_machine(url) and host not in hosts]
    return f"export NO_PROXY={','.join(hosts)} and no_proxy alike (beside what they hold)"


@contextmanager
def naming_proxy(url: str) -> Iterator[None]:
    """Errors of requests to `url` say which proxy they went through, if one is between."""
    try:
        yield
    except R3Error as error:
        proxy = proxy_of(url)
        if proxy is None:
            raise
        raise type(error)(
            f"{str(error).rstrip('.')}. The request went through the proxy {proxy}, which may be what failed or "
            f"answered. If the server can be reached without it: {no_proxy_for(url)}"
        ) from error


def _of_environment(url: str, more: tuple[str, ...]) -> str | None:
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    scheme = next((name for name in (parts.scheme, *more) if proxies.get(name)), None)
    if scheme is None or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxy = proxies[scheme]
    names = [f"{scheme}_proxy", f"{scheme}_proxy".upper()]
    name = next((name for name, value in variables(names).items() if value == proxy), "the system's settings")
    return f"{_without_password(proxy)} (of {name})"


def _without_password(proxy: str) -> str:
    scheme, there, rest = proxy.rpartition("://")
    return f"{scheme}{there}{rest.rpartition('@')[2]}"
