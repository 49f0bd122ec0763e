"""An exported crosscoder to a repository on the Hugging Face hub, as the user who is logged in there (`hf auth login`)."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalTokenNotFoundError

from pipeline.config.errors import UserError


def push(directory: Path, repository: str, *, private: bool, message: str) -> str:
    """Uploads what `directory` holds as one commit, to a repository that is made where there is none; gives its address.

    A repository that is there keeps its visibility and its other files. Raises `UserError` where the hub refuses, or is out of reach.
    """
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=directory, commit_message=message).repo_url)
    except LocalTokenNotFoundError:
        raise UserError(f"nobody is logged in to the hub here; run `hf auth login`, then `hf upload {repository} {directory}`") from None
    except Exception as error:  # which HTTP client the library has, and so whose errors, depends on its release
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository} could not be uploaded ({reason}); the files are in {directory}: `hf upload {repository} {directory}` tries again"
        ) from error
