"""Models from the Hugging Face hub: the two files of one, in the local cache, as the hub says they are."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from coatnet.errors import UserError, first_line
from coatnet.version import __version__

CONFIG, WEIGHTS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
ASKING = {"library_name": "coatnet", "library_version": __version__}
# Seconds. Without a limit of ours, huggingface_hub waits for a firewall that answers nothing until the system gives up.
_PATIENCE = 10
_SHA256 = re.compile(r"[0-9a-f]{64}")


class UnknownRepository(UserError):
    """The hub has no model of this name, or none that it shows to this person."""


def download(repo_id: str, *, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The local folder with the config.json and the model.safetensors of `owner/name`.

    `revision` is a branch, a tag or a full commit hash; both files are of one commit. What is in the cache is not
    fetched again, and a hub out of reach is replaced by the cache. A file that the hub keeps under git-LFS is held to
    its SHA-256 each time; only a cache without symbolic links, offline, has none to hold it to. With `allow_pickle`,
    a repository without model.safetensors gives its pytorch_model.bin instead.

    Raises:
        UnknownRepository: there is no such model, or it is private.
        UserError: the name is malformed, the model gated, the revision unknown, the weights missing, a pickle or
            damaged; the hub out of reach and the model not in the cache; huggingface_hub not installed.
    """
    require_huggingface_hub()
    from huggingface_hub import HfApi, errors, hf_hub_download

    with explained(repo_id, revision):
        try:
            api = HfApi(**ASKING)
            listing = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=_PATIENCE)
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
            reason = _why_out_of_reach(error)
            if reason is None:
                raise
            folder, weights = _find_in_cache(repo_id, revision, allow_pickle, reason)
            digests = {}
        else:
            files = {file.rfilename: file.lfs for file in listing.siblings or ()}
            weights = _choose(repo_id, files, allow_pickle)
            # Not snapshot_download: it draws its bar into pipes too, and for what is in the cache already.
            config = hf_hub_download(repo_id, CONFIG, revision=revision, **ASKING)
            folder = Path(config).parent  # its name is the commit that the revision stood for
            hf_hub_download(repo_id, weights, revision=folder.name, **ASKING)
            listed = {name: lfs.sha256 for name, lfs in files.items() if lfs}
            digests = listed if folder.name == listing.sha else {}
    for name in (CONFIG, weights):
        _verify(repo_id, folder / name, digests)
    return folder


def require_huggingface_hub() -> None:
    """Raises UserError if it is not installed. It reads its HF_... environment variables when first imported."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError("the Hugging Face hub needs huggingface_hub: pip install 'coatnet[hub]'") from None


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """What huggingface_hub raises inside the block becomes one line for the person at the keyboard."""
    from huggingface_hub import constants, errors

    home = constants.ENDPOINT
    try:
        yield
    except UserError:
        raise
    except errors.HFValidationError as error:
        raise UserError(
            f"{repo_id!r} is not the name of a model on the hub; write owner/name, "
            "such as timm/coatnet_0_rw_224.sw_in1k"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(f"{repo_id} is gated ({_log_in()}); ask for access at {home}/{repo_id}") from error
    except errors.RepositoryNotFoundError as error:
        raise UnknownRepository(f"{home} has no model {repo_id!r}, or it is private ({_log_in()})") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo_id} has no revision {revision!r}; give a branch, a tag or a full commit hash"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "the token is not accepted; log in with `hf auth login` or set HF_TOKEN anew"
        reason = hint if status == 401 else first_line(error.server_message or error)
        raise UserError(f"{repo_id}: {home} answers {status}: {reason}") from error
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{repo_id}: the exchange with {home} failed: {reason}; try again") from error


def _log_in() -> str:
    from huggingface_hub import get_token

    return "your token does not open it" if get_token() else "log in with `hf auth login` or set HF_TOKEN"


def _why_out_of_reach(error: Exception) -> str | None:
    """Why the hub gave no answer; None if it gave one."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"{constants.ENDPOINT} answers {status}" if status in (408, 429) or status >= 500 else None
    return f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"


def _find_in_cache(repo_id: str, revision: str | None, allow_pickle: bool, reason: str) -> tuple[Path, str]:
    """The folder of the cache and the name of the weights in it."""
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        folder = Path(hf_hub_download(repo_id, CONFIG, revision=revision, local_files_only=True)).parent
        held = {name: None for name in (CONFIG, WEIGHTS, PICKLE) if (folder / name).is_file()}
    except errors.LocalEntryNotFoundError:
        folder, held = Path(), {}
    if not held.keys() & {WEIGHTS, PICKLE}:
        model = f"{repo_id} at revision {revision}" if revision else repo_id
        option = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{model} is not in the cache at {constants.HF_HUB_CACHE}, and {reason}; "
            f"once online, run `hf download {repo_id} {CONFIG} {WEIGHTS}{option}`"
        )
    return folder, _choose(repo_id, held, allow_pickle)


def _choose(repo_id: str, files: Mapping[str, object], allow_pickle: bool) -> str:
    """The file of weights to take from a repository with these files."""
    if CONFIG not in files:
        raise UserError(f"{repo_id} has no {CONFIG}, so it is neither a bundle nor a model of timm's")
    if WEIGHTS in files:
        return WEIGHTS
    if PICKLE not in files:
        raise UserError(f"{repo_id} has no {WEIGHTS}; only that format of weights is read")
    if not allow_pickle:
        raise UserError(
            f"{repo_id} has no {WEIGHTS}, only {PICKLE}: a pickle, which can run code of its author when it is read; "
            "if you trust the author, ask for it with allow_pickle=True"
        )
    return PICKLE


def _verify(repo_id: str, path: Path, digests: Mapping[str, str]) -> None:
    """Raises UserError if the file is not the one that the hub announced.

    The cache names a file by its ETag, which is the SHA-256 of what is kept under git-LFS, and a snapshot links to
    it. Only the first link counts: a second one leads to a name of another kind (a blob that repositories share).
    Where the name is none of that sort, the checksum is the one that the hub lists, if it was asked.
    """
    announced = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not _SHA256.fullmatch(announced):
        announced = digests.get(path.name, "")
    if not announced:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != announced:
        raise UserError(
            f"{repo_id}: {path.name} is damaged: its SHA-256 is {found}, the hub's is {announced}; "
            f"delete {path.resolve()} and try again"
        )
