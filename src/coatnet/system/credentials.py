"""Credentials in the URL of a source: kept in the memory of this process, out of all that is printed or written.

`conceal` is called where a source is named (a recipe, `open_dataset`), `connection` and `token_of` where it is
connected to; everything between sees the URL without user, password, query and fragment.
"""

import netrc
import os
import re
from contextlib import suppress
from urllib.parse import quote, unquote, urlsplit

from coatnet.errors import without_credentials

_given: dict[str, str] = {}  # sources as they were given, by what is shown of them


def conceal(source: str) -> str:
    """A source as it may be shown and stored. This process remembers how it was given."""
    if "://" not in source:
        return source
    shown = re.split("[?#]", without_credentials(source), maxsplit=1)[0]
    if shown != source:
        _given[shown] = source
    return shown


def connection(shown: str) -> tuple[str, str]:
    """The URL to connect to, with its credentials, and what follows the name of each file below it.

    A web server gets those of the netrc file (~/.netrc, or what NETRC names) if none were given.
    """
    given = _given.get(shown, shown)
    if not given.startswith(("http://", "https://")):
        return given, ""
    base, mark, query = given.partition("#")[0].partition("?")
    if "@" not in urlsplit(base).netloc:
        with suppress(OSError, ValueError, netrc.NetrcParseError):  # there is none, or it is not one
            if found := netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(base).hostname or ""):
                base = base.replace("://", f"://{quote(found[0], safe='')}:{quote(found[2], safe='')}@", 1)
    return base.rstrip("/"), mark + query


def token_of(shown: str) -> str | None:
    """The password, or else the user, that a URL was given with."""
    user = re.match(r"[\w+.-]+://([^/?#\s]*)@", _given.get(shown, shown))
    return unquote(user[1].rpartition(":")[2]) if user else None
