"""Where a draft that the user names is on this machine: a folder, or a model of the hub.

As vLLM finds its own models: what is in the Hugging Face cache is taken from there, without a word
to the hub; what is not there is fetched, unless ``HF_HUB_OFFLINE`` forbids it.
"""

from __future__ import annotations

import os
from pathlib import Path

from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.files import is_file, read_json
from vllm_specplus.strict import MOST_QUOTED, quoted

#: What is read of a draft: configs, tokenizers and weights.
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
#: In a repository's folders lie other formats, and so do Mistral's own weights beside the others.
OTHERS = ["*/*", "consolidated*"]


def model_folder(name: str, what: str) -> str:
    """Return the folder of a draft: ``name`` itself, or that of the model of this name on the hub.

    ``what`` calls the draft for the user. DraftModelError, with a sentence, if the name could be
    one of the hub and nothing is there; what can only be a folder is for who reads it to refuse.
    """
    if os.path.isdir(name):
        return name
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    offline = constants.HF_HUB_OFFLINE
    try:
        # Without patterns the hub's library would also miss files that nobody reads here.
        cached = snapshot_download(name, local_files_only=True, ignore_patterns="*")
        if offline or _is_whole(Path(cached)):
            return cached
    except HFValidationError:
        return name
    except LocalEntryNotFoundError:
        if offline:
            raise DraftModelError(
                f"{what} {quoted(name)} is neither a folder nor in the Hugging Face cache, and "
                f"HF_HUB_OFFLINE is set: name a folder, or download the model first"
            ) from None
    try:
        return snapshot_download(name, allow_patterns=FILES, ignore_patterns=OTHERS)
    except Exception as error:  # whatever a network has in store
        reason = " ".join(str(error).split())[:MOST_QUOTED]
        raise DraftModelError(
            f"{what} {quoted(name)} is no folder, and fetching it from the Hugging Face hub failed "
            f"({type(error).__name__}: {reason}): name a folder, or a model that can be reached"
        ) from None


def _is_whole(folder: Path) -> bool:
    """Are config and weights there? A cache also holds parts of what others have asked for."""
    if not is_file(folder / "config.json"):
        return False
    index = folder / "model.safetensors.index.json"
    if not is_file(index):
        return any(folder.glob("*.safetensors"))
    try:
        parts = set(read_json(index, "the index of the weights")["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return all(is_file(folder / str(part)) for part in parts)
