"""Uploading an exported folder to the Hugging Face hub: only when the user says so, and private unless they say so."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from vmd_scale.errors import UserError, first_line
from vmd_scale.export.folder import OWN


def push(folder: Path, name: str, public: bool = False, own: Sequence[str] = OWN) -> str:
    """Create the repository where there is none, and upload the export. Returns its address.

    What is left there of an earlier export, such as files of weights that a loader would read, is deleted in the same
    commit; other files of the repository stay.

    Args:
        name: USER/MODEL. Who one is, is what `hf auth login` has stored.
        own: patterns of the names that an export may have; other files of the folder are not uploaded.

    Raises:
        UserError: no network, no permission, or a name that is none.
    """
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Export of {folder.name}",
            allow_patterns=list(own),
            delete_patterns=list(own),
        )
    except Exception as error:  # of the client, of http, of the operating system: they have no common base
        raise UserError(f"--push {name}: not uploaded ({first_line(error)}); the folder is whole: {folder}") from None
    return str(address)
