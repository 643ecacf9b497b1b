"""A bundle onto the Hugging Face hub: all of its files in one commit."""

from pathlib import Path

from coatnet.bundle.hub import ASKING, CONFIG, WEIGHTS, explained, require_huggingface_hub
from coatnet.errors import UserError, first_line

CARD = "README.md"


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str = "Upload a model of coatnet",
) -> str:
    """Put a bundle's weights, config and card into the repository `owner/name`; the address of its page.

    The repository and the branch are made if there are none. All three files arrive in one commit or none does, and
    those that the hub has already are not sent again. Needs a token that may write: `hf auth login` or HF_TOKEN.

    Raises:
        UserError: the folder is no bundle; there is no token, or it may not write there; a private repository is
            wanted and there is a public one; the hub is out of reach; huggingface_hub is not installed.
    """
    files = {name: Path(folder) / name for name in (WEIGHTS, CONFIG, CARD)}
    for name, path in files.items():
        if not path.is_file():
            raise UserError(f"{folder} is not a bundle: it has no {name}; a bundle holds {', '.join(files)}")
    require_huggingface_hub()
    from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token

    token = get_token()
    if token is None:
        raise UserError(
            f"pushing to {repo_id} needs a token that may write; log in with `hf auth login` or set HF_TOKEN "
            f"(tokens are made at {constants.ENDPOINT}/settings/tokens)"
        )
    api = HfApi(token=token, **ASKING)
    with explained(repo_id, branch):
        try:
            # None leaves the choice to the owner's own default, which may be private.
            page = api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(page.repo_id).private:
                raise UserError(
                    f"{repo_id} exists and is public; make it private at {page}/settings, or push elsewhere"
                )
            if branch:
                api.create_branch(page.repo_id, branch=branch, exist_ok=True)
            operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            api.create_commit(page.repo_id, operations, commit_message=message, revision=branch)
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise
            reason = first_line(error.server_message or error)
            raise UserError(f"the token may not write to {repo_id}: {reason}") from error
    return f"{page}/tree/{branch}" if branch else str(page)
