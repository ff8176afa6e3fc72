"""Files in a local folder or on the Hub: found, and uploaded."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lorafa.errors import ConfigError, SourceError, first_line, shorten
from lorafa.settings.checks import check_arguments
from lorafa.storage.paths import user_path

if TYPE_CHECKING:
    from typing_extensions import Unpack


class HubOptions(TypedDict, total=False):
    """What may be said about a Hub repository; the meanings are ``huggingface_hub.hf_hub_download``'s."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    endpoint: str | None
    proxies: Mapping[str, str] | None
    """Passed on where the installed huggingface_hub takes it; releases since 1.0 read HTTPS_PROXY instead."""
    use_auth_token: str | bool | None
    """The older name of ``token``."""


def locate(
    source: str | Path, filenames: Sequence[str], *, subfolder: str | None = None, **hub: Unpack[HubOptions]
) -> Path:
    """The first of ``filenames`` that a folder or a Hub repository has.

    Args:
        source: a local folder, or a Hub id such as "owner/name".
        filenames: in order of preference.
        subfolder: where in the folder or repository to look.
        hub: as :class:`HubOptions`; unused for a local folder.

    Raises:
        SourceError: the folder, repository or file does not exist, or the Hub cannot be reached.
        ConfigError: an option that does not exist.
    """
    check_arguments("Finding a file", hub, HubOptions.__optional_keys__)
    root = user_path(source)
    if root.is_dir():
        return _in_folder(root / subfolder if subfolder else root, filenames)
    if root.is_file() or not _may_be_hub_id(str(source)):
        hint = " It is a file: name the folder it is in." if root.is_file() else " Check the path."
        raise SourceError(f"There is no folder {str(source)!r}.{hint}")
    return _on_hub(str(source), filenames, subfolder, hub)


def _in_folder(folder: Path, filenames: Sequence[str]) -> Path:
    if not folder.is_dir():
        raise SourceError(f"There is no folder {str(folder)!r}. Check the path and the subfolder.")
    for filename in filenames:
        if (folder / filename).is_file():
            return folder / filename
    held = shorten(sorted(entry.name for entry in folder.iterdir()), 8) or "nothing"
    raise SourceError(
        f"The folder {str(folder)!r} has no {' or '.join(filenames)}; it holds: {held}. "
        "Name the folder an adapter was saved to; one not called 'default' is in a subfolder of its own name."
    )


def _may_be_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) <= 2 and all(parts) and parts[0] not in (".", "..", "~") and "\\" not in source


def _known_to(download: Callable[..., Any], hub: HubOptions) -> dict[str, Any]:
    """The options as the installed huggingface_hub calls them.

    Raises:
        ConfigError: it has no ``proxies``.
    """
    known: dict[str, Any] = dict(hub)
    older, proxies = known.pop("use_auth_token", None), known.pop("proxies", None)
    if older is not None and known.get("token") is None:
        known["token"] = older
    if proxies:
        if "proxies" not in inspect.signature(download).parameters:
            raise ConfigError(
                "The installed huggingface_hub takes no proxies=. Set the environment variable HTTPS_PROXY instead, "
                "which it reads."
            )
        known["proxies"] = proxies
    return known


def _on_hub(repo: str, filenames: Sequence[str], subfolder: str | None, hub: HubOptions) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise SourceError(
            f"{repo!r} is no local folder, and the Hub needs a package that is not installed. Check the path, or run: "
            "pip install huggingface_hub"
        ) from error
    start = f"{repo!r} is no local folder, and "
    known = _known_to(hf_hub_download, hub)
    for filename in filenames:
        try:
            return Path(hf_hub_download(repo, filename, subfolder=subfolder, **known))
        except LocalEntryNotFoundError as error:  # it is an EntryNotFoundError too: not cached, and no connection
            raise SourceError(
                f"{start}the Hub could not be reached for {filename} ({first_line(error)}). Check the path and the "
                "connection, or download the repository elsewhere and name its folder."
            ) from error
        except EntryNotFoundError:
            continue
        except GatedRepoError as error:
            raise SourceError(
                f"{start}the Hub repository is gated. Ask for access on its page, then pass token=."
            ) from error
        except RevisionNotFoundError as error:
            raise SourceError(
                f"The Hub repository {repo!r} has no revision {hub.get('revision')!r}. Its page lists its branches."
            ) from error
        except RepositoryNotFoundError as error:
            raise SourceError(
                f"{start}the Hub has no such repository. Check the name; a private one needs token=."
            ) from error
        except HFValidationError as error:
            raise SourceError(f"{start}it cannot be the name of a Hub repository: {first_line(error)}") from error
        except (OSError, ConnectionError) as error:
            raise SourceError(
                f"{start}the Hub gave no {filename}: {first_line(error)}. Try again, or use a folder."
            ) from error
    place = f"{repo}/{subfolder}" if subfolder else repo
    raise SourceError(
        f"The Hub repository {place!r} has no {' or '.join(filenames)}. Is it an adapter? Check the subfolder."
    )


class UploadOptions(TypedDict, total=False):
    """What may be said about an upload to the Hub; the meanings are those of transformers' ``push_to_hub``."""

    commit_message: str | None
    """Default: "Upload adapter" or what else is uploaded."""
    commit_description: str | None
    private: bool | None
    """Whether a repository that is made here is private; None goes by the settings of the account."""
    token: str | bool | None
    revision: str | None
    """The branch to commit to, made if it is not there."""
    create_pr: bool
    """Open a pull request instead of committing."""
    endpoint: str | None
    """Address of the Hub, as in :class:`HubOptions`."""
    max_shard_size: int | str | None
    """Not read: an adapter is one file."""


@dataclass
class Upload:
    """Files on their way to the Hub."""

    folder: Path
    """Where to write them."""
    commit: Any = None
    """The commit they went with, once they are there."""


@contextmanager
def uploaded(repo_id: str, what: str, options: UploadOptions) -> Iterator[Upload]:
    """Upload what is written into the folder this gives, when the block ends without an error.

    The repository is made if it is not there; a README.md it has is not replaced.

    Args:
        what: the word for it in the commit message.

    Raises:
        ConfigError: an option that does not exist.
        SourceError: huggingface_hub is not installed, the Hub cannot be reached, or it refuses.
    """
    check_arguments("push_to_hub", options, UploadOptions.__optional_keys__)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise SourceError(
            "push_to_hub needs a package that is not installed. Run: pip install huggingface_hub"
        ) from error
    api = HfApi(endpoint=options.get("endpoint"), token=options.get("token"))
    revision, as_request = options.get("revision"), bool(options.get("create_pr"))
    with tempfile.TemporaryDirectory(prefix="lorafa-") as folder:
        upload = Upload(Path(folder))
        yield upload
        try:
            repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr") and not as_request:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            has_card = api.file_exists(repo_id, "README.md", revision=revision)
            upload.commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=options.get("commit_message") or f"Upload {what}",
                commit_description=options.get("commit_description"),
                revision=revision,
                create_pr=as_request,
                ignore_patterns=["README.md"] if has_card else None,
            )
        except HFValidationError as error:
            raise SourceError(f"{repo_id!r} cannot be the name of a Hub repository: {first_line(error)}.") from error
        except Exception as error:  # the Hub's, or of whichever HTTP library its client uses
            raise SourceError(_refused(repo_id, error)) from error


def _refused(repo_id: str, error: Exception) -> str:
    """Why an upload failed, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    step = {
        401: "Log in ('hf auth login') or pass token=, of an account that may write there.",
        403: "The token may not write there: pass one of an account that may, with write access.",
        404: "Check the name and the revision; a private repository needs token=.",
    }.get(status, "Try again, or save_pretrained and upload the folder.")  # type: ignore[arg-type]
    return f"The upload to {repo_id!r} failed: {first_line(error)}. {step}"
