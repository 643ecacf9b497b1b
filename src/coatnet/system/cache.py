"""The one folder for files that can be made or fetched again: graphs, blocks of remote shards, indexes, downloads."""

import os
from pathlib import Path

from coatnet.errors import UserError


def cache_folder() -> Path:
    """The environment variable COATNET_CACHE_DIR, else `$XDG_CACHE_HOME/coatnet`, else `~/.cache/coatnet`.

    Raises:
        UserError: neither variable is set and the user has no home folder.
    """
    if own := os.environ.get("COATNET_CACHE_DIR"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "coatnet"
    try:
        return Path.home() / ".cache" / "coatnet"
    except RuntimeError as error:
        raise UserError("there is no home folder for cached files; set COATNET_CACHE_DIR to a folder") from error
