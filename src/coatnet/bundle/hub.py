"""Download models from the Hugging Face hub into its local cache, checked, and upload bundles to it."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coatnet.errors import UserError, first_line, import_extra
from coatnet.system.files import sha256_of
from coatnet.system.terminal import report_wait
from coatnet.version import __version__

CONFIG, WEIGHTS, CARD, PICKLE = "config.json", "model.safetensors", "README.md", "pytorch_model.bin"
CALIBRATION = "calibration.safetensors"  # optional
_CLIENT = {"library_name": "coatnet", "library_version": __version__}
# Without it, huggingface_hub waits for the system's limit when a firewall drops packets, which takes minutes.
_TIMEOUT_SECONDS = 10
_SHA256 = re.compile(r"[0-9a-f]{64}")


class UnknownRepository(UserError):
    """The hub has no model of this name, or the user may not see it."""


@report_wait("fetching the model from the Hugging Face hub")
def download(
    repo_id: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    before: Callable[[int], None] = lambda num_bytes: None,
) -> Path:
    """Download config.json and model.safetensors of a model, both of one commit, and return their local folder.

    Cached files are not downloaded again, and without a connection the cache alone is used. The SHA-256 of a file that
    the hub keeps under git-LFS is checked each time, except offline in a cache without symbolic links, which has none.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or full commit hash; the main branch if None.
        allow_pickle: download pytorch_model.bin if there is no model.safetensors.
        before: called with the bytes that are to be downloaded, 0 if the cache has them, before that begins.

    Raises:
        UnknownRepository: there is no such model, or it is private.
        UserError: the name is malformed, the model gated, the revision unknown, the weights missing, a pickle or
            damaged; the hub is unreachable and the model not in the cache; huggingface_hub is not installed.
    """
    import_extra("huggingface_hub", "hub", "the Hugging Face hub")
    from huggingface_hub import HfApi, errors, hf_hub_download, try_to_load_from_cache

    with _translate_errors(repo_id, revision):
        try:
            api = HfApi(**_CLIENT)
            listing = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
            reason = _why_unreachable(error)
            if reason is None:
                raise
            folder, weights = _find_in_cache(repo_id, revision, allow_pickle, reason)
            digests, optional = {}, [CALIBRATION] if (folder / CALIBRATION).is_file() else []
            before(0)
        else:
            files = {file.rfilename: file.lfs for file in listing.siblings or ()}
            weights = _choose_weights(repo_id, files, allow_pickle)
            optional = [CALIBRATION] if CALIBRATION in files else []
            sizes = {file.rfilename: file.size or 0 for file in listing.siblings or ()}
            missing = [
                name
                for name in (CONFIG, weights, *optional)
                if not isinstance(try_to_load_from_cache(repo_id, name, revision=listing.sha), str)
            ]
            before(sum(sizes[name] for name in missing))
            # Not snapshot_download, which draws a progress bar into pipes too, and for cached files.
            config = hf_hub_download(repo_id, CONFIG, revision=revision, **_CLIENT)
            folder = Path(config).parent  # named after the commit of the revision
            for name in (weights, *optional):
                hf_hub_download(repo_id, name, revision=folder.name, **_CLIENT)
            listed = {name: lfs.sha256 for name, lfs in files.items() if lfs}
            digests = listed if folder.name == listing.sha else {}
    for name in (CONFIG, weights, *optional):
        _verify(repo_id, folder / name, digests)
    return folder


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str = "Upload a model of coatnet",
) -> str:
    """Upload a bundle's weights, config and card in one commit, and return the address of its page.

    The repository and the branch are created if they do not exist; files that the hub has already are not sent again,
    and the calibration of a model before is removed if this one has none.
    Needs a token with write access: `hf auth login` or HF_TOKEN.

    Args:
        folder: the folder of a bundle.
        repo_id: "owner/name".
        private: make a new repository private.
        branch: the main branch if None.
        message: of the commit.

    Raises:
        UserError: the folder is not a bundle; there is no token, or it may not write there; `private` was asked for
            and the repository is public; the hub is unreachable; huggingface_hub is not installed.
    """
    files = {name: Path(folder) / name for name in (WEIGHTS, CONFIG, CARD)}
    for name, path in files.items():
        if not path.is_file():
            raise UserError(f"{folder} is not a bundle: it has no {name}; a bundle holds {', '.join(files)}")
    if (optional := Path(folder) / CALIBRATION).is_file():
        files[CALIBRATION] = optional
    import_extra("huggingface_hub", "hub", "the Hugging Face hub")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors, get_token

    token = get_token()
    if token is None:
        raise UserError(
            f"pushing to {repo_id} needs a token that may write; log in with `hf auth login` or set HF_TOKEN "
            f"(tokens are made at {constants.ENDPOINT}/settings/tokens)"
        )
    api = HfApi(token=token, **_CLIENT)
    with _translate_errors(repo_id, branch):
        try:
            # None keeps the default of the owner, which may be private.
            page = api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(page.repo_id).private:
                raise UserError(
                    f"{repo_id} exists and is public; make it private at {page}/settings, or push elsewhere"
                )
            if branch:
                api.create_branch(page.repo_id, branch=branch, exist_ok=True)
            operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            if CALIBRATION not in files and api.file_exists(page.repo_id, CALIBRATION, revision=branch):
                operations.append(CommitOperationDelete(CALIBRATION))  # of the model before
            api.create_commit(page.repo_id, operations, commit_message=message, revision=branch)
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise
            reason = first_line(error.server_message or error)
            raise UserError(f"the token may not write to {repo_id}: {reason}") from error
    return f"{page}/tree/{branch}" if branch else str(page)


@contextmanager
def _translate_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Translate the errors of huggingface_hub inside the block to UserError."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
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
        raise UserError(f"{repo_id} is gated ({_log_in()}); ask for access at {endpoint}/{repo_id}") from error
    except errors.RepositoryNotFoundError as error:
        raise UnknownRepository(f"{endpoint} has no model {repo_id!r}, or it is private ({_log_in()})") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo_id} has no revision {revision!r}; give a branch, a tag or a full commit hash"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "the token is not accepted; log in with `hf auth login` or set HF_TOKEN anew"
        reason = hint if status == 401 else first_line(error.server_message or error)
        raise UserError(f"{repo_id}: {endpoint} answers {status}: {reason}") from error
    except PermissionError as error:
        place = error.filename or constants.HF_HUB_CACHE
        raise UserError(f"{repo_id}: {place} cannot be written; HF_HOME names another folder for the cache") from error
    except (errors.HTTPError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{repo_id}: the exchange with {endpoint} failed: {reason}; try again") from error


def _log_in() -> str:
    from huggingface_hub import get_token

    return "your token does not open it" if get_token() else "log in with `hf auth login` or set HF_TOKEN"


def _why_unreachable(error: Exception) -> str | None:
    """Why the hub could not be reached; None if it answered."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"{constants.ENDPOINT} answers {status}" if status in (408, 429) or status >= 500 else None
    return f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"


def _find_in_cache(repo_id: str, revision: str | None, allow_pickle: bool, reason: str) -> tuple[Path, str]:
    """Return the folder of a cached model and the name of its weights."""
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        folder = Path(hf_hub_download(repo_id, CONFIG, revision=revision, local_files_only=True)).parent
        cached = {name: None for name in (CONFIG, WEIGHTS, PICKLE) if (folder / name).is_file()}
    except errors.LocalEntryNotFoundError:
        folder, cached = Path(), {}
    if not cached.keys() & {WEIGHTS, PICKLE}:
        model = f"{repo_id} at revision {revision}" if revision else repo_id
        option = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{model} is not in the cache at {constants.HF_HUB_CACHE}, and {reason}; "
            f"once online, run `hf download {repo_id} {CONFIG} {WEIGHTS} {CALIBRATION}{option}`"
        )
    return folder, _choose_weights(repo_id, cached, allow_pickle)


def _choose_weights(repo_id: str, files: Mapping[str, object], allow_pickle: bool) -> str:
    """Return the name of the weights to download from a repository with these files."""
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
    """Raise UserError if the SHA-256 of a file is not the one that the hub announced.

    A snapshot in the cache links to a file named after its ETag, which is the SHA-256 of files under git-LFS. Only the
    first link counts: a second one leads to a blob that repositories share. If the name is no SHA-256, the one that the
    hub listed is used, if it was reached.
    """
    expected = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not _SHA256.fullmatch(expected):
        expected = digests.get(path.name, "")
    if not expected:
        return
    if (found := sha256_of(path)) != expected:
        raise UserError(
            f"{repo_id}: {path.name} is damaged: its SHA-256 is {found}, the hub's is {expected}; "
            f"delete {path.resolve()} and try again"
        )
