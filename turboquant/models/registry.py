"""The models known by name, and how a typed name becomes a `ModelSpec`.

A name is a key of `MODELS`, a hub id (`organisation/name`), or the path of a local folder or GGUF file.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "smollm2-135m"


class ModelError(RuntimeError):
    """A model cannot be loaded; the message is one sentence that says why and what to do about it."""


class UnknownNameError(ModelError):
    """There is no model, weight precision or device of that name."""


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from.

    Attributes:
        name: The name a person types.
        hub_id: Repository on the model hub, or the path of a local folder or GGUF file.
        revision: Commit of that repository; None where the weights do not come from the hub.
        note: One line about the model.
        parameters: Size in billions of parameters; 0 where it is not known before loading.
        gated: Whether the hub asks for a licence to be accepted first.
    """

    name: str
    hub_id: str
    revision: str | None
    note: str
    parameters: float = 0.0
    gated: bool = False


# fmt: off
_KNOWN = (
    ModelSpec(EMBEDDED, "HuggingFaceTB/SmolLM2-135M-Instruct", None, "Built in: no download, Q4_1 weights widened to float32", 0.135),
    ModelSpec("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct", "aa8e72537993ba99e69dfaafa59ed015b17504d1", "Keys with a bias, 2 KV heads", 3.09),
    ModelSpec("phi-2", "microsoft/phi-2", "ef382358ec9e382308935a992d908de099b64c23", "Partial rotary embedding, head_dim 80, no chat template", 2.78),
    ModelSpec("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", "f5db02db724555f92da89c216ac04704f23d4590", "32 KV heads, no grouping", 6.74, gated=True),
    ModelSpec("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3", "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db", "Grouped heads, 32,768 tokens", 7.25),
    ModelSpec("qwen3-0.6b", "Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca", "Normalised keys, head_dim 128, thinks before it answers", 0.596),
    ModelSpec("qwen3-1.7b", "Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", "Normalised keys, head_dim 128, thinks before it answers", 1.72),
    ModelSpec("qwen3-4b", "Qwen/Qwen3-4B", "1cfa9a7208912126459214e8b04321603b3df60c", "Normalised keys, head_dim 128, thinks before it answers", 4.02),
    ModelSpec("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", "9213176726f574b556790deb65791e0c5aa438b6", "Grouped heads, head_dim 64", 1.24, gated=True),
    ModelSpec("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", "0cb88a4f764b7a12671c53f0838cd831a0843b95", "Grouped heads, head_dim 128", 3.21, gated=True),
    ModelSpec("gemma-3-1b-it", "google/gemma-3-1b-it", "dcc83ea841ab6100d6b47a070329e1ba4cf78752", "One KV head, sliding and full layers mixed", 1.0, gated=True),
    ModelSpec("phi-4-mini-instruct", "microsoft/Phi-4-mini-instruct", "5a149550068a1eb93398160d8953f5f56c3603e9", "Partial rotary embedding, 8 KV heads", 3.84),
)
# fmt: on
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _KNOWN}


def find_spec(name: str) -> ModelSpec:
    """Return the spec a typed name means.

    Args:
        name: Key of `MODELS` (in any case), hub id `organisation/name`, or path of a local folder or
            GGUF file.

    Raises:
        UnknownNameError: If the name is none of these; close matches are named.
    """
    name = name.strip()
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    for spec in MODELS.values():
        if spec.hub_id.lower() == name.lower() and spec.revision:
            return spec
    if name.startswith(("/", ".", "~")) or name.lower().endswith(".gguf") or (name and Path(name).is_dir()):
        return _local_spec(name)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        return ModelSpec(name, name, "main", "From the model hub")
    raise UnknownNameError(_unknown(name))


def is_embedded(spec: ModelSpec) -> bool:
    """Whether the spec is that of the built-in model; a folder may be called the same."""
    return spec == MODELS[EMBEDDED]


def is_local(spec: ModelSpec) -> bool:
    """Whether the spec names a folder or file of this machine rather than a hub repository."""
    return spec.revision is None and not is_embedded(spec)


def _local_spec(name: str) -> ModelSpec:
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        path = path.absolute()  # what a link points to may be called otherwise
        if not path.is_file():
            raise UnknownNameError(f"There is no GGUF file {path} on this machine.")
        return ModelSpec(path.name, str(path), None, "Local GGUF file")
    path = path.resolve()
    if path.is_file():
        raise UnknownNameError(f"{path} is no folder and no GGUF file (its name would end in .gguf).")
    if not path.is_dir():
        raise UnknownNameError(f"There is no folder {path} on this machine.")
    return ModelSpec(path.name, str(path), None, "Local folder")


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"Unknown model {name!r}: {hint}Known names are {', '.join(MODELS)}; "
        "a hub id such as Qwen/Qwen3-0.6B or a local folder works too."
    )
