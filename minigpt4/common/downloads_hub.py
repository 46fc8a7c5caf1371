"""Fetch a Hugging Face repository with huggingface_hub, and check each file against what the Hub says."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import filter_repo_objects

from minigpt4.common.download import PATIENT, Fetched, Retry
from minigpt4.common.downloads_checks import WEIGHTS_SUFFIXES, check_opens, digest
from minigpt4.common.errors import WeightsError
from minigpt4.common.output_files import human

logger = logging.getLogger(__name__)

T = TypeVar("T")
# OSError, the base of the HTTP library that this huggingface_hub uses, and what its storage client raises.
FAULTS = (*HfHubHTTPError.__bases__, RuntimeError)
IGNORED = (".gitattributes", "*.msgpack", "*.h5", "original/*")  # other frameworks' copies of the weights


def fetch_repository(
    repository: str, folder: Path, ignore: tuple[str, ...] = (), retry: Retry = PATIENT
) -> list[Fetched]:
    """Bring `owner/name` into `folder`; every file has the size and, where the Hub knows it, the sha256.

    A stopped download goes on where it was. HF_ENDPOINT, HF_TOKEN and `hf auth login` work as everywhere.

    Raises:
        WeightsError: no access, no connection, no room, or a file that is not what the Hub says it is.
    """
    info = _patiently(
        repository, retry, lambda: HfApi().model_info(repository, files_metadata=True, timeout=retry.timeout)
    )
    skipped = [*IGNORED, *ignore]
    files = list(filter_repo_objects(info.siblings or [], ignore_patterns=skipped, key=lambda file: file.rfilename))
    _need_room(folder, files)
    _patiently(
        repository,
        retry,
        lambda: snapshot_download(repository, revision=info.sha, local_dir=folder, ignore_patterns=skipped),
    )
    return [_check(folder, file, f"hf:{repository}@{info.sha}") for file in files]


def _patiently(repository: str, retry: Retry, call: Callable[[], T]) -> T:
    """Call the Hub, again after faults of the connection; WeightsError where that cannot help."""
    failures = 0
    while True:
        try:
            return call()
        except (GatedRepoError, RepositoryNotFoundError) as error:
            raise WeightsError(_no_access(repository, error)) from error
        except FAULTS as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            lasting = status is not None and 400 <= status < 500 and status not in (408, 429)
            local = isinstance(error, OSError) and error.errno and not isinstance(error, LocalEntryNotFoundError)
            failures += 1
            if lasting or local or failures >= retry.tries:
                raise WeightsError(f"Hugging Face repository {repository}: {error}") from error
            wait = retry.wait(failures)
            logger.warning("%s: %s; trying again in %.0f s", repository, error, wait)
            time.sleep(wait)


def _no_access(repository: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"Hugging Face repository {repository} is gated: accept its licence at "
            f"https://huggingface.co/{repository}, then run `hf auth login` (or set HF_TOKEN) and try again"
        )
    return (
        f"Hugging Face has no repository {repository}, or hides it from you: look at "
        f"https://huggingface.co/{repository}; if it is private, run `hf auth login` (or set HF_TOKEN)"
    )


def _need_room(folder: Path, files: list[RepoSibling]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(file.size or 0 for file in files if not (folder / file.rfilename).exists())
    # What an interrupted run left lies in the library's own folder below.
    kept = sum(part.stat().st_size for part in (folder / ".cache").rglob("*.incomplete"))
    free = shutil.disk_usage(folder).free
    if missing - kept > free:
        raise WeightsError(
            f"{folder}: {human(missing - kept)} still to come, {human(free)} free on this disk; make room, "
            "or choose another folder"
        )


def _check(folder: Path, file: RepoSibling, source: str) -> Fetched:
    path = folder / file.rfilename
    size = path.stat().st_size
    sha256 = digest(path)
    wanted = file.lfs.sha256 if file.lfs else None
    try:
        if file.size is not None and size != file.size:
            raise WeightsError(f"{path}: {size} bytes, the Hub says {file.size}")
        if wanted and sha256 != wanted:
            raise WeightsError(f"{path}: its sha256 is {sha256}, the Hub says {wanted}")
        if path.suffix in WEIGHTS_SUFFIXES:
            check_opens(path)
    except WeightsError as error:
        path.unlink()
        raise WeightsError(f"{error} (from {source}; the file was deleted, run the same command again)") from error
    return Fetched(path, source, size, sha256)
