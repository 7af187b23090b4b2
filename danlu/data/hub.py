"""Data sets of the Hugging Face hub, fetched as Parquet: `hub:OWNER/NAME` or `hub:OWNER/NAME/CONFIG/SPLIT`."""

from __future__ import annotations

from pathlib import Path

from danlu.data.settings import HUB
from danlu.errors import DanluError

CONVERTED = "refs/convert/parquet"  # the branch where the hub keeps every public data set as CONFIG/SPLIT/*.parquet
PATIENCE = 20  # seconds to wait for the hub to answer


def fetch(reference: str) -> list[tuple[Path, str]]:
    """Download the Parquet files of one split; without a network, find them in the cache.

    Args:
        reference: `hub:OWNER/NAME`, followed by `/CONFIG/SPLIT` where the data set has more than one.

    Returns: (file in the local cache, its name `hub:OWNER/NAME/CONFIG/SPLIT/FILE`) in order of the names.
    Raises DanluError where there is no network and no cached copy, no such data set, or several splits to choose from.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repo, split = _parse(reference)
    try:
        about = HfApi().dataset_info(repo, revision=CONVERTED, timeout=PATIENCE)
        chosen = _choose([file.rfilename for file in about.siblings or []], repo, split)
        root = Path(snapshot_download(repo, repo_type="dataset", revision=CONVERTED, allow_patterns=chosen))
    except DanluError:
        raise
    except GatedRepoError:
        raise DanluError("the data set asks for an account", where=reference, fix="log in: hf auth login") from None
    except RepositoryNotFoundError:
        raise DanluError(
            "the hub has no such data set", where=reference, fix="check the spelling of OWNER/NAME"
        ) from None
    except Exception as error:  # each version of huggingface_hub has its own network errors
        root = _cached(repo, split, reference, error)
        chosen = _choose([file.relative_to(root).as_posix() for file in root.rglob("*")], repo, split)
    return [(root / name, f"{HUB}{repo}/{name}") for name in chosen]


def _parse(reference: str) -> tuple[str, str]:
    """(OWNER/NAME, CONFIG/SPLIT or "")"""
    parts = reference.removeprefix(HUB).rstrip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise DanluError("is no data set of the hub", where=reference, fix="write it as hub:OWNER/NAME")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _choose(names: list[str], repo: str, split: str) -> list[str]:
    """The Parquet files of the one split that is meant."""
    splits: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.endswith(".parquet")):
        splits.setdefault(name.rpartition("/")[0], []).append(name)
    meant = [files for name, files in splits.items() if f"{name}/".startswith(f"{split}/" if split else "")]
    if len(meant) != 1:
        what = "has several splits" if meant else "has no such split" if splits else "has no Parquet files"
        choices = ", ".join(f"{HUB}{repo}/{name}" for name in list(splits)[:20])
        raise DanluError(
            f"the data set {what}",
            where=f"{HUB}{repo}/{split}".rstrip("/"),
            fix=f"name one: {choices}" if splits else None,
        )
    return meant[0]


def _cached(repo: str, split: str, reference: str, error: Exception) -> Path:
    """The copy an earlier run left in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        wanted = f"{split}/*" if split else "*.parquet"
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=CONVERTED, allow_patterns=wanted, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        trouble = (str(error).splitlines() or [type(error).__name__])[0]
        raise DanluError(
            f"the hub cannot be reached ({trouble}), and no copy is in its cache",
            where=reference,
            fix="connect to the network, or bring the data set's Parquet files here and name their directory",
        ) from None
