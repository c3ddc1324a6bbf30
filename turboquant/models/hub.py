"""Files of models on the Hugging Face hub: what is on this machine already, and downloading the rest.

Only safetensors weights are fetched. `huggingface_hub` reads `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` and `HF_ENDPOINT`.
"""

import contextlib
import errno
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from turboquant.models import embedded
from turboquant.models.registry import EMBEDDED, MODELS, ModelError, ModelSpec

Progress = Callable[[float, str], None]

# Weights in subfolders and duplicates such as Mistral's consolidated.safetensors are left out.
WANTED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "tekken.json",
)
TIMEOUT_S = 10.0


def available_models() -> list[str]:
    """Names in `MODELS` whose files are on this machine; asks no network."""
    return [
        name
        for name, spec in MODELS.items()
        if (embedded.is_available() if name == EMBEDDED else cached_folder(spec) is not None)
    ]


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a complete set of safetensors weights (every shard the index names)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
            return all(Path(shard).name == shard and (folder / shard).is_file() for shard in shards)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False  # no index that names files of this folder
    return (folder / "model.safetensors").is_file()


def cached_folder(spec: ModelSpec) -> Path | None:
    """The folder of a complete copy of the model in the hub cache, without asking the network, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(spec.hub_id, "config.json", revision=spec.revision)
    folder = Path(path).parent if isinstance(path, str) else None
    return folder if folder and has_weights(folder) else None


def download_config(spec: ModelSpec, on_this_machine: list[str]) -> Path:
    """Check that the repository holds safetensors weights and fetch its configuration.

    Args:
        spec: Model on the hub.
        on_this_machine: Names to offer when the hub cannot be reached.

    Returns:
        Folder that holds `config.json`.

    Raises:
        ModelError: If the hub or the repository cannot be reached, or holds no safetensors weights.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_errors(spec, on_this_machine):
        info = HfApi().model_info(spec.hub_id, revision=spec.revision, timeout=TIMEOUT_S)
        names = [file.rfilename for file in info.siblings or []]
        if not any(name.startswith("model") and name.endswith(".safetensors") for name in names):
            raise ModelError(no_safetensors(spec.hub_id, [name for name in names if name.lower().endswith(".gguf")]))
        # Asked for by the name of the revision, so that the cache remembers which commit that was when offline.
        return Path(hf_hub_download(spec.hub_id, "config.json", revision=spec.revision)).parent


def download(spec: ModelSpec, folder: Path, progress: Progress, on_this_machine: list[str]) -> Path:
    """Fetch weights and tokenizer of the commit whose configuration lies in `folder`; return their folder.

    Raises:
        ModelError: If the download fails.
    """
    from huggingface_hub import snapshot_download

    bar = _bar(progress, f"Downloading {spec.name}")
    with _hub_errors(spec, on_this_machine):
        path = snapshot_download(spec.hub_id, revision=folder.name, allow_patterns=list(WANTED), tqdm_class=bar)
        return Path(path)


def no_safetensors(name: str, files: Sequence[str] = ()) -> str:
    """The sentence for a model that comes without safetensors weights, but perhaps with GGUF files."""
    if files:
        return (
            f"{name} holds GGUF files: download one of them ({files[0]}, for example) and give its path as the model."
        )
    return (
        f"{name} has no complete safetensors weights; other formats (pickled .bin or .pt files) can run code "
        "and are never loaded, so choose a model that is stored as safetensors."
    )


def _bar(progress: Progress, text: str) -> type:
    """A tqdm class that prints nothing and passes the downloaded share of all bytes to `progress`."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B" and self.total:
                progress(min(1.0, self.n / self.total), f"{text}: {self.n / 2**30:.1f} of {self.total / 2**30:.1f} GiB")
            return shown

    return Bar


@contextlib.contextmanager
def _hub_errors(spec: ModelSpec, on_this_machine: list[str]) -> Iterator[None]:
    """Turn errors of the hub, the network and the disk into sentences."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        # Network errors come from httpx, whose classes share no builtin base.
        if not isinstance(error, OSError | ValueError) and not type(error).__module__.startswith("http"):
            raise
        raise _explained(error, spec, on_this_machine) from error


def _explained(error: Exception, spec: ModelSpec, on_this_machine: list[str]) -> ModelError:
    """Say in one sentence what a failed request means and what helps."""
    from huggingface_hub import errors

    here = ", ".join(on_this_machine) or "none"
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{spec.hub_id}"
        return ModelError(f"{spec.hub_id} needs a licence: accept it on its model page ({page}) and set HF_TOKEN.")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{spec.hub_id} has no revision {spec.revision} on the model hub.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"The model hub has no model {spec.hub_id} that you may read: "
            "check the name, or set HF_TOKEN if it is private."
        )
    if isinstance(error, errors.HFValidationError):
        return ModelError(f"{spec.hub_id!r} is no valid hub id: write it as organisation/name.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ModelError(f"{spec.hub_id} is not on this machine and HF_HUB_OFFLINE is set; these models are: {here}.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        reason = error.strerror or "disk"
        return ModelError(
            f"Cannot store {spec.hub_id} ({reason}): free some disk space or set HF_HOME to another folder."
        )
    return ModelError(f"Cannot reach the model hub; these models are on this machine: {here}.")
