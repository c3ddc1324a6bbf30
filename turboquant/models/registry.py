"""The models known by name, and how a typed name becomes a `ModelSpec`.

A name is a key of `MODELS`, a hub id (`organisation/name`), or the path of a local folder or GGUF file.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "smollm2-135m"
NEWEST = "main"
"""The branch of a repository whose newest commit is taken where there is no copy; what was loaded keeps its commit."""


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
        revision: Commit or branch of that repository; None where the weights do not come from the hub.
        note: One line about the model.
        parameters: Size in billions of parameters, as published; 0 where it is not known before loading.
        licence: Of the weights: the identifier of SPDX, or the name that their makers gave it.
        gated: Whether the hub asks for a licence to be accepted first.
    """

    name: str
    hub_id: str
    revision: str | None
    note: str
    parameters: float = 0.0
    licence: str = ""
    gated: bool = False


# fmt: off
_KNOWN = (
    ModelSpec(EMBEDDED, "HuggingFaceTB/SmolLM2-135M-Instruct", None, "Built in: no download, Q4_1 weights widened to float32", 0.135, "Apache-2.0"),
    ModelSpec("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct", "aa8e72537993ba99e69dfaafa59ed015b17504d1", "Keys with a bias, 2 KV heads", 3.09, "Qwen Research"),
    ModelSpec("phi-2", "microsoft/phi-2", "ef382358ec9e382308935a992d908de099b64c23", "Partial rotary embedding, head_dim 80, no chat template", 2.78, "MIT"),
    ModelSpec("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", "f5db02db724555f92da89c216ac04704f23d4590", "32 KV heads, no grouping", 6.74, "Llama 2", gated=True),
    ModelSpec("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3", "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db", "Grouped heads, 32,768 tokens", 7.25, "Apache-2.0"),
    ModelSpec("qwen3-0.6b", "Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca", "Normalised keys, head_dim 128, thinks before it answers", 0.596, "Apache-2.0"),
    ModelSpec("qwen3-1.7b", "Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", "Normalised keys, head_dim 128, thinks before it answers", 1.72, "Apache-2.0"),
    ModelSpec("qwen3-4b", "Qwen/Qwen3-4B", "1cfa9a7208912126459214e8b04321603b3df60c", "Normalised keys, head_dim 128, thinks before it answers", 4.02, "Apache-2.0"),
    ModelSpec("qwen3.5-0.8b", "Qwen/Qwen3.5-0.8B", NEWEST, "One layer in four has a KV cache, the others a recurrent state", 0.8, "Apache-2.0"),
    ModelSpec("qwen3.5-2b", "Qwen/Qwen3.5-2B", NEWEST, "One layer in four has a KV cache, the others a recurrent state", 2.0, "Apache-2.0"),
    ModelSpec("qwen3.5-4b", "Qwen/Qwen3.5-4B", NEWEST, "One layer in four has a KV cache, the others a recurrent state", 4.0, "Apache-2.0"),
    ModelSpec("qwen3.5-9b", "Qwen/Qwen3.5-9B", NEWEST, "One layer in four has a KV cache, the others a recurrent state", 9.0, "Apache-2.0"),
    ModelSpec("qwen3.5-27b", "Qwen/Qwen3.5-27B", NEWEST, "One layer in four has a KV cache, the others a recurrent state", 27.0, "Apache-2.0"),
    ModelSpec("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", NEWEST, "Mixture of experts; one layer in four has a KV cache", 35.0, "Apache-2.0"),
    ModelSpec("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", NEWEST, "Grouped heads, 131,072 tokens", 8.03, "Llama 3.1", gated=True),
    ModelSpec("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", "9213176726f574b556790deb65791e0c5aa438b6", "Grouped heads, head_dim 64", 1.24, "Llama 3.2", gated=True),
    ModelSpec("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", "0cb88a4f764b7a12671c53f0838cd831a0843b95", "Grouped heads, head_dim 128", 3.21, "Llama 3.2", gated=True),
    ModelSpec("llama-3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct", NEWEST, "Grouped heads, 131,072 tokens", 70.6, "Llama 3.3", gated=True),
    ModelSpec("gemma-3-1b-it", "google/gemma-3-1b-it", "dcc83ea841ab6100d6b47a070329e1ba4cf78752", "One KV head, sliding and full layers mixed", 1.0, "Gemma", gated=True),
    ModelSpec("gemma-4-e2b-it", "google/gemma-4-E2B-it", NEWEST, "Sliding and full layers mixed, some share keys and values", 5.1, "Apache-2.0"),
    ModelSpec("gemma-4-e4b-it", "google/gemma-4-E4B-it", NEWEST, "Sliding and full layers mixed, some share keys and values", 8.0, "Apache-2.0"),
    ModelSpec("gemma-4-26b-a4b-it", "google/gemma-4-26B-A4B-it", NEWEST, "Mixture of experts, sliding and full layers mixed", 26.0, "Apache-2.0"),
    ModelSpec("gemma-4-31b-it", "google/gemma-4-31B-it", NEWEST, "Sliding and full layers mixed, two head dimensions", 31.0, "Apache-2.0"),
    ModelSpec("gpt-oss-20b", "openai/gpt-oss-20b", NEWEST, "Learned sinks; stored as MXFP4, written out to 16 bits", 20.9, "Apache-2.0"),
    ModelSpec("mistral-small-3.1-24b-instruct", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", NEWEST, "Reads images too; here it is asked in text", 24.0, "Apache-2.0"),
    ModelSpec("ministral-3-3b-instruct", "mistralai/Ministral-3-3B-Instruct-2512", NEWEST, "Stored as FP8, written out to 16 bits", 3.8, "Apache-2.0"),
    ModelSpec("ministral-3-8b-instruct", "mistralai/Ministral-3-8B-Instruct-2512", NEWEST, "Stored as FP8, written out to 16 bits", 8.8, "Apache-2.0"),
    ModelSpec("ministral-3-14b-instruct", "mistralai/Ministral-3-14B-Instruct-2512", NEWEST, "Stored as FP8, written out to 16 bits", 13.9, "Apache-2.0"),
    ModelSpec("phi-4-mini-instruct", "microsoft/Phi-4-mini-instruct", "5a149550068a1eb93398160d8953f5f56c3603e9", "Partial rotary embedding, 8 KV heads", 3.84, "MIT"),
    ModelSpec("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", NEWEST, "4 KV heads, no rotary embedding in every fourth layer", 3.08, "Apache-2.0"),
    ModelSpec("glm-4.7-flash", "zai-org/GLM-4.7-Flash", NEWEST, "Mixture of experts, a joint latent for keys and values (MLA)", 31.0, "MIT"),
    ModelSpec("granite-4.0-micro", "ibm-granite/granite-4.0-micro", NEWEST, "Attention in all layers", 3.4, "Apache-2.0"),
    ModelSpec("granite-4.0-h-tiny", "ibm-granite/granite-4.0-h-tiny", NEWEST, "Mixture of experts; few layers have a KV cache, the others a state", 6.94, "Apache-2.0"),
    ModelSpec("lfm2-1.2b", "LiquidAI/LFM2-1.2B", NEWEST, "Six layers have a KV cache, the others a short convolution", 1.17, "LFM Open License 1.0"),
    ModelSpec("lfm2-8b-a1b", "LiquidAI/LFM2-8B-A1B", NEWEST, "Mixture of experts; six layers have a KV cache", 8.34, "LFM Open License 1.0"),
    ModelSpec("olmo-3-7b-instruct", "allenai/Olmo-3-7B-Instruct", NEWEST, "Sliding and full layers mixed", 7.3, "Apache-2.0"),
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
        return ModelSpec(name, name, NEWEST, "From the model hub")
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
        f"Unknown model {name!r}: {hint}`turboquant models` lists the names; a hub id such as Qwen/Qwen3-0.6B, "
        "a local folder or a .gguf file works too."
    )
