"""The location and content hash of a language model's checkpoint, without loading it.

A reference is a folder in Hugging Face layout or a hub name; either resolves to a local folder whose content has one
hash.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from raypipe.errors import UsageError

# What shapes a model's answers: weights, configuration, tokenizer, chat template. Never pickled weights (*.bin, *.pt).
_CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_CHUNK_BYTES = 1 << 22


def resolve_checkpoint(ref: str) -> Path:
    """The local folder of a checkpoint; a hub name is fetched into (or found in) the local hub cache.

    Raises UsageError if the folder is missing or not a checkpoint, or if the hub does not have the model, refuses it or
    cannot be reached.
    """
    path = Path(ref).expanduser()
    if path.is_dir():
        return _checked(path, ref)
    looks_like_a_path = ref.startswith(("/", ".", "~")) or ref.count("/") != 1 or path.exists()
    if looks_like_a_path:
        raise UsageError(f"There is no checkpoint folder {ref!r}.", "Name a folder or a hub model owner/name.")
    return _checked(_from_hub(ref), ref)


def checkpoint_hash(folder: Path) -> str:
    """sha256 (hex) over names and bytes of the files that shape the model's answers, in order of name."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _CONTENT for file in folder.glob(pattern)}):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _checked(folder: Path, ref: str) -> Path:
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{ref!r} is not a checkpoint: it has no config.json.", "Name a folder in Hugging Face layout."
        )
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{ref!r} has no *.safetensors weights.", "Convert it to safetensors; pickled weights are never loaded."
        )
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    offline_remedy = "Check the network, or download it elsewhere and name its folder."
    try:
        return Path(snapshot_download(name, allow_patterns=list(_CONTENT)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        remedy = "Check the name; a gated model also needs HF_TOKEN."
        raise UsageError(f"There is no folder and no hub model {name!r}.", remedy) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UsageError(f"There is no folder {name!r}, and the hub cannot be reached.", offline_remedy) from error
