"""Checkpoints of hubs by name: hf:ORG/NAME[@REVISION], and timm:NAME for the file of timm's table.

huggingface_hub keeps them in its own cache; its variables hold: HF_HOME, HF_TOKEN, HF_ENDPOINT for
a mirror, HF_HUB_OFFLINE and others.
"""

import difflib
import re
import shlex
from pathlib import Path

from models.errors import RunError, UserError

WEIGHTS, OLDER = "model.safetensors", "pytorch_model.bin"  # the second where the first is not
CONFIGS = ("config.json", "preprocessor_config.json")  # Hugging Face writes both, timm the first


def is_hub_name(given: str) -> bool:
    return given.startswith(("hf:", "timm:"))


def repository(given: str) -> tuple[str, str | None]:
    """(ORG/NAME, revision or None for the newest) of a name. Raises UserError for a wrong one."""
    place = _timm_place(given) if given.startswith("timm:") else given.removeprefix("hf:")
    name, at, revision = place.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) or bool(at) != bool(revision):
        raise UserError(f"{given}: a model of the hub is hf:ORG/NAME or hf:ORG/NAME@REVISION")
    return name, revision or None


def fetch(given: str, offline: bool = False) -> Path:
    """The file of weights that `given` names, in the hub's cache, its config files beside it.

    What is not in the cache is downloaded, unless `offline`; without a network the cache is taken
    as it is. All files are of one commit. Raises UserError.
    """
    from huggingface_hub import errors, hf_hub_download

    name, revision = repository(given)
    by_hand = ["hf", "download", name, WEIGHTS, *CONFIGS]
    by_hand += ["--revision", revision] if revision else []
    cached_only = offline or not _reachable(name, revision)
    at = revision
    # The weights come last: if they are in the cache, the files that explain them are there too.
    for file in (*CONFIGS, WEIGHTS, OLDER):
        try:
            path = Path(hf_hub_download(name, file, revision=at, local_files_only=cached_only))
            if file in (WEIGHTS, OLDER):
                return path
            at = path.parent.name  # the commit
        except errors.LocalEntryNotFoundError as error:
            if file == OLDER:
                cause = "downloads are off" if offline else "the hub cannot be reached"
                why = f"not in the hub's cache, and {cause}; by hand: {shlex.join(by_hand)}"
                raise UserError(f"{given}: {why}") from error
        except errors.EntryNotFoundError as error:
            if file == OLDER:
                raise UserError(f"{given}: it has no {WEIGHTS} and no {OLDER}") from error
        except Exception as error:  # of the many libraries below it
            raise UserError(f"{given}: {_reason(error)}") from error


def _reachable(name: str, revision: str | None) -> bool:
    """One request: without it, hf_hub_download tries for half a minute, and says so each time."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIGS[0], revision=revision))
    except (errors.HfHubHTTPError, ValueError):  # an answer, or a name that is none
        return True
    except (errors.HTTPError, OSError):  # no network, or HF_HUB_OFFLINE
        return False
    return True


def push(folder: Path, given: str, message: str) -> str:
    """Upload the files of `folder` to hf:ORG/NAME, which is made if it is missing.

    Returns the address of the commit. Raises RunError.
    """
    from huggingface_hub import HfApi

    name, _ = repository(given)
    try:
        HfApi().create_repo(name, exist_ok=True)
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:  # of the many libraries below it
        raise RunError(f"{folder} was not uploaded to {given}: {_reason(error)}") from error
    return commit.commit_url


def _timm_place(given: str) -> str:
    """The place on the hub that timm's table of pre-trained models names."""
    import timm

    name = given.removeprefix("timm:")
    try:
        row = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a known model, and an unknown tag
        row = None
    if row and row.hf_hub_id and not row.hf_hub_filename:
        return row.hf_hub_id
    architecture, models = name.partition(".")[0], timm.list_models()
    near = timm.list_pretrained(f"{architecture}.*") if architecture in models else []
    near = near or difflib.get_close_matches(architecture, models, 2, 0.7)
    advice = f". Did you mean {' or '.join(near[:2])}?" if near else ""
    raise UserError(f"{given}: timm's table names no file{advice}")


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner asks for an agreement: accept it on its page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private: `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if "401" in str(error)[:40]:
        return "the hub does not know you: `hf auth login` or HF_TOKEN"
    return " ".join(str(error).split())[:300] or type(error).__name__
