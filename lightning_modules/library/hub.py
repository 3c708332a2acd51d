"""Adapters and libraries on the Hugging Face hub: safetensors and JSON, never pickles."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from lightning_modules.checksums import SUMS
from lightning_modules.library.store import AdapterLibrary

_PATTERNS = ["*.safetensors", "*.json", "*.md", SUMS]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_adapter(adapter: str) -> Path:
    """Return the folder of an adapter, downloaded where it is a hub id.

    Args:
        adapter: A folder, or `owner/name`.

    Raises:
        ValueError: If there is no such folder, and it is no hub id or cannot be downloaded.
    """
    path = Path(adapter).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(adapter):
        return path
    return _download(adapter, None, None)


def push(library: AdapterLibrary, repo: str, *, private: bool = True) -> str:
    """Upload a library.

    Args:
        library: What to upload; checked first.
        repo: `owner/name`.
        private: Whether a new repository is private.

    Returns:
        Its address.

    Raises:
        ValueError: If the library is not sound, or the hub refuses or cannot be reached.
    """
    if problems := library.verify():
        raise ValueError(f"{library.root} is not sound: {problems[0]}")
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=library.root, allow_patterns=_PATTERNS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"repo={repo!r}: the hub took nothing. {error}") from error
    return str(address)


def pull(repo: str, root: Path, revision: str | None = None) -> AdapterLibrary:
    """Download a library and check every file.

    Args:
        repo: `owner/name`.
        root: The folder to make; must not exist.
        revision: Branch, tag or commit.

    Raises:
        ValueError: If `root` exists, nothing can be downloaded, or what came is no sound library.
    """
    if root.exists():
        raise ValueError(f"library={str(root)!r} exists already. Give a new folder, or remove that one.")
    _download(repo, revision, root)
    library = AdapterLibrary(root)
    if problems := library.verify():
        raise ValueError(f"{repo} is no sound library: {problems[0]}")
    return library


def _download(repo: str, revision: str | None, root: Path | None) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, local_dir=root, allow_patterns=_PATTERNS))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise ValueError(
            f"{repo!r} is no folder here, and as a hub id it cannot be downloaded. {error}"
        ) from error
