"""What becomes of families of models, as tests expect it; their tiny models are in `turboquant.models.families`."""

WORKS = {
    **dict.fromkeys(("llama-3", "qwen2.5", "qwen3", "qwen3-moe", "mistral", "ministral3", "phi", "phi3"), 4),
    **dict.fromkeys(("phi4-mini-hub", "gpt-neox", "stablelm", "glm4", "glm4-moe", "smollm3", "granite", "gpt2"), 4),
    **dict.fromkeys(("gemma2", "gpt-oss", "lfm2"), 2),
    **dict.fromkeys(("qwen3.5-text", "qwen3-next", "gemma3-text", "gemma4-26b-a4b-text", "granite-4-h", "olmo3"), 1),
    **dict.fromkeys(("cohere2", "exaone4"), 1),
}
"""Some of those that work, and how many of their layers are compressed."""
IMAGE_TEXT = ("mistral3", "llava", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "gemma3", "internvl", "smolvlm", "glm4v")
"""Some of those that answer text and see images as well."""
_INDEXED = ("deepseek-v4", "qwen4-exp-text", "minimax-m3-text")
_INDEXED_LATENT = ("deepseek-v3.2", "glm-5", "mistral-large-4", "hy-v4", "axk2", "dots3-note-text")
_LATENT = (
    "deepseek-v3",
    "mistral4",
    "deepseek-v2-lite",
    "glm4-moe-lite",
    "kimi-k2.5",
    "kimi-linear",
    "youtu",
    "minicpm3",
)
_OWN_CODE = ("falcon-7b", "falcon-40b", "gptj", "gpt-neo", "bloom", "mpt", "codegen", "xglm", "openai-gpt", "rwkv")
_NO_FULL_LAYER = ("mistral-v0.1", "phi3-sliding", "mamba", "mamba2", "falcon-mamba", "recurrent-gemma", "inkling-text")
_MIXED = ("falcon-h1", "zamba", "zamba2", "zaya", "inkling2-text")
REFUSED: dict[str, str] = {
    **dict.fromkeys(_INDEXED, "an indexer chooses which tokens its attention sees"),
    **dict.fromkeys(
        (*_LATENT, *_INDEXED_LATENT, "longcat-flash", "bailing-hybrid", "axk1"), "it stores a joint latent"
    ),
    **dict.fromkeys(_OWN_CODE, "its attention does not run through the library's AttentionInterface"),
    **dict.fromkeys((*_NO_FULL_LAYER, *_MIXED), "none of its layers keeps keys and values of all tokens"),
    **dict.fromkeys(("doge", "jetmoe"), "its layers work on keys and values themselves"),
    **dict.fromkeys(("diffllama", "mllama"), "it does not run with packed keys and values"),
    **dict.fromkeys(("jamba", "bamba", "xlstm"), "transformers itself computes something else"),
    "minimax": "it does not run by its own attention",
    "paligemma": "it reads text with an encoder",
    "gemma3n": "it needs the package timm",
}
"""All those that are refused, with words of the reason; every other one works."""
