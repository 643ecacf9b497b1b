"""Access: the names that the server goes by, the pages that may make it compute, and the token.

Any page that a person visits can send requests to a server on the same machine or network. It can read the answers if
its own name is made to lead there (DNS rebinding), so a request must name the server by a name it is bound to. An
address in digits cannot be such a name. And it can make the server compute without reading the answer, so a request
that computes must not come from a page of another origin.
"""

import hmac
import re
from collections.abc import Collection
from ipaddress import ip_address
from typing import Annotated, Any

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import Scope

from coatnet.errors import one_line
from coatnet.server.errors import RequestError

ANY_HOST = "*"
_READING = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s\[\]:/?#@]+))(?::\d+)?")


def check_origin(scope: Scope, allowed_hosts: Collection[str], own_names: Collection[str]) -> None:
    """Refuse a request that names another server, or that makes this one compute for a page of another origin.

    Args:
        scope: of the request.
        allowed_hosts: names of the server besides localhost and addresses, in lower case, at which pages may be that
            use it; `*` is any name of the server, and of no page.
        own_names: more names of the server. A page at one of them, but another port, is of another origin.

    Raises:
        RequestError: code "host" or "origin".
    """
    headers = Headers(scope=scope)
    host, origin = headers.get("host"), headers.get("origin")
    if host is not None and not _is_known(_host_name(host), {*allowed_hosts, *own_names}):
        raise RequestError(
            "host",
            f"this server is not known as {one_line(host[:100])!r}; start it with --allowed-host NAME if it should be",
        )
    if origin is None or scope["method"] in _READING:
        return
    page = origin.partition("://")[2].lower()
    if not page or (page != (host or "").lower() and _host_name(page) not in allowed_hosts):
        raise RequestError("origin", f"a page of {one_line(origin[:100])!r} may not use this server")


def _is_known(name: str, allowed_hosts: Collection[str]) -> bool:
    if name == "localhost" or name.endswith(".localhost") or name in allowed_hosts or ANY_HOST in allowed_hosts:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    """The name in `name:port` or `[address]:port`, in lower case; empty if it is neither."""
    found = _HOST.fullmatch(host.lower())
    return (found[1] or found[2]).rstrip(".") if found else ""


def token_required(token: str | None) -> list[Any]:
    """The dependencies of a route that needs the token; none without a token."""

    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        offered = given.credentials if given else ""
        if token is not None and not hmac.compare_digest(offered.encode(), token.encode()):
            raise RequestError("token", "this server requires a token: send the header Authorization: Bearer TOKEN")

    return [] if token is None else [Depends(check)]
