"""What becomes of families of models, as tests expect it; their tiny models are in `turboquant.models.families`."""

WORKS = {
    **dict.fromkeys(("llama-3", "qwen2.5", "qwen3", "qwen3-moe", "mistral", "ministral3", "phi", "phi3"), 4),
    **dict.fromkeys(("phi4-mini-hub", "gpt-neox", "stablelm", "glm4", "glm4-moe", "smollm3", "granite", "gpt2"), 4),
    **dict.fromkeys(("deepseek-v3", "falcon-h1", "falcon-7b", "bloom", "jetmoe", "diffllama"), 4),
    **dict.fromkeys(("gemma2", "gpt-oss", "lfm2"), 2),
    **dict.fromkeys(("qwen3.5-text", "qwen3-next", "gemma3-text", "gemma4-26b-a4b-text", "granite-4-h", "olmo3"), 1),
    **dict.fromkeys(("cohere2", "exaone4", "jamba"), 1),
}
"""Some of those that work, and how many of their layers are compressed."""
IMAGE_TEXT = ("mistral3", "llava", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "gemma3", "internvl", "smolvlm", "glm4v")
"""Some of those that answer text and see images as well."""
_INDEXED = ("deepseek-v3.2", "deepseek-v4", "glm-5", "qwen4-exp-text", "minimax-m3-text", "mistral-large-4", "hy-v4")
_NO_FULL_LAYER = ("mistral-v0.1", "phi3-sliding", "mamba", "mamba2", "falcon-mamba", "recurrent-gemma")
REFUSED: dict[str, str] = {
    **dict.fromkeys((*_INDEXED, "axk2", "dots3-note-text"), "an indexer chooses which tokens its attention sees"),
    **dict.fromkeys(_NO_FULL_LAYER, "none of its layers keeps keys and values of all tokens"),
    **dict.fromkeys(("rwkv", "xlstm", "openai-gpt"), "it does not use the cache of keys and values that it is given"),
    "inkling-text": "does not compute a learned position bias",
    "inkling2-text": "does not compute sinks that depend on the token",
    "bamba": "transformers itself computes something else",
    "minimax": "it does not run by its own attention",
    "paligemma": "it reads a prompt both ways",
    "gemma3n": "it needs the package timm",
}
"""All those that are refused, with words of the reason; every other one works."""
