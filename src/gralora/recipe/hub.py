"""Uploading an adapter to the Hugging Face hub."""

from pathlib import Path

# huggingface_hub passes the errors of its HTTP library on, which differs between its versions: no common base class.
_ERRORS = Exception


def check_access(repository: str) -> None:
    """Check that a token is known and the hub answers, before hours of training end in a refusal.

    Raises:
        ValueError: The name is bad, no token is known, or the hub refuses it or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"`push_to_hub` must name a repository: {error}") from None
    try:
        HfApi().whoami()
    except _ERRORS as error:
        raise ValueError(
            f"`push_to_hub` needs a hub that accepts your token: {_reason(error)} Run `hf auth login`, or leave it out."
        ) from None


def upload(folder: Path, repository: str) -> str:
    """Upload the adapter, its card and its curve, and return the address of the repository.

    Raises:
        RuntimeError: The upload failed; the folder is complete all the same.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(repository, exist_ok=True)
        # The options name files and folders of this machine.
        ignored = ["checkpoints/**", "logs/**", ".*", "run.json", "config.yaml", "metrics.json"]
        api.upload_folder(folder_path=folder, repo_id=created.repo_id, ignore_patterns=ignored)
        return str(created)
    except _ERRORS as error:
        raise RuntimeError(
            f"The upload to {repository!r} failed: {_reason(error)} The adapter in {str(folder)!r} is complete. To "
            f"upload it: hf upload {repository} {folder} --exclude 'checkpoints/*'"
        ) from None


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(".") + "." if lines else f"{type(error).__name__}."
