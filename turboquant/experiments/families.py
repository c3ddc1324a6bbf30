"""Does a family of models work with a compressed cache? Each a tiny one with random weights, both ways in.

The way of `load_model` (saved, loaded, run) and that of a model of your own (`attach`) are held against the unmodified
model's own attention over Hugging Face's own cache, fed in the same pieces. A family works, or it is refused with a
reason; anything else is a fault of this program.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turboquant import hf_attention
from turboquant.cache.build import build_cache, cache_report
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.methods import METHODS, Method, parse_method
from turboquant.models.dry_run import DryRunError, Lossless, attach, feeds_singly
from turboquant.models.families import FAMILIES, Family, UnknownFamilyError, config_of, family_model
from turboquant.models.load import LoadedModel, ModelError, load_model
from turboquant.models.tiny import tiny_tokenizer
from turboquant.records.comparison import CacheReport
from turboquant.records.metrics import metric
from turboquant.records.settings import FamilySettings
from turboquant.sizing import ModelConfigError, SizingError, kv_bytes, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS, FIRST, CHUNK = 200, 100, 7
"""Tokens that are read, in the first call and in each of the others."""
PROMPTS, ANSWER = (100, 61), 24
"""Lengths of the prompts in a left-padded batch, and tokens that are generated for each."""
LIMIT = 0.002
"""How far logits may be from the model's own, in standard deviations of these, where nothing is rounded."""
FULL, LOSSLESS = METHODS["full"](), Lossless()
EIGHT = parse_method("turboquant:bits=8,residual_length=16,group_size=32")
FOUR = parse_method("turboquant:bits=4,residual_length=16,group_size=32")
WORKS, REFUSED, WRONG, CRASH, UNKNOWN = "works", "refused", "WRONG", "CRASH", "unknown"
"""What becomes of a family; the last: this version of transformers does not know it."""


class _WrongError(Exception):
    """It says something else than by its own attention."""


def run(loaded: None, methods: Sequence[Method], settings: FamilySettings, watch: Watch) -> Iterator[Any]:
    """Check one family; yields one measurement, of no method."""
    watch.progress(0.0, settings.family)
    yield None, check_family(FAMILIES[settings.family])


def _check(methods: Sequence[Method], settings: FamilySettings) -> None:
    if settings.family not in FAMILIES:
        raise ValueError(f"there is no family {settings.family!r}: choose from {', '.join(FAMILIES)}")


def check_family(family: Family) -> Measurement:
    """Return what becomes of a family: `detail` has `outcome` and `reason`, and the same of an own model."""
    detail: dict[str, Any] = {"stands_for": family.stands_for, "users": family.users, "model_type": family.kind}
    try:
        model: PreTrainedModel | None = family_model(family)
    except UnknownFamilyError as error:
        return Measurement({}, detail=detail | {"outcome": UNKNOWN, "reason": str(error)})
    except ImportError:  # its files can be had without the package that runs them
        model = None
    reference = None if model is None else _Reference(model)
    found = _Figures()
    with tempfile.TemporaryDirectory() as folder, _no_bars():
        (config_of(family) if model is None else model).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        detail |= _outcome(lambda: found.loaded(load_model(folder, weights="fp32", device="cpu"), reference))
        found.predict(Path(folder), detail)
    if reference is not None:
        own = _outcome(lambda: found.own(family_model(family), reference))
        detail |= {f"own_{name}": value for name, value in own.items()}
    return Measurement(found.metrics, found.report, detail=detail)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the progress bars of transformers, which show nothing of models this small."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _outcome(work: Callable[[], None]) -> dict[str, str | None]:
    """Run one way in, and say how it ended."""
    try:
        work()
    except (ModelError, DryRunError) as error:
        return {"outcome": REFUSED, "reason": _reason(str(error))}
    except _WrongError as error:
        return {"outcome": WRONG, "reason": str(error)}
    except Exception as error:
        return {"outcome": CRASH, "reason": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return {"outcome": WORKS, "reason": None}


def _reason(text: str) -> str:
    """Cut the model's name in front and the advice behind."""
    for start in ("cannot be used here: ", "cannot be loaded: ", "cannot serve this model: "):
        text = text.partition(start)[2] or text
    return text.partition("; choose a model with plain attention")[0].rstrip(".")


class _Reference:
    """What a model says by its own attention; None where it does not run with a cache of Hugging Face's at all."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.logits = self._try(lambda: _read(model, FULL)[0])
        self.answers = self._try(lambda: _answers(model, FULL))

    def fed_as(self, model: "PreTrainedModel") -> Tensor:
        """Return the logits of tokens that are fed as the model at hand asks for.

        Raises:
            _WrongError: If there are none.
        """
        singly = feeds_singly(model)
        logits = self._try(lambda: _read(self.model, FULL, chunk=1)[0]) if singly else self.logits
        if logits is None:
            raise _WrongError("it was accepted and does not run by its own attention")
        return logits

    def _try(self, work: Callable[[], Tensor]) -> Tensor | None:
        try:
            return work()
        except Exception:  # whatever a model's own code makes of a cache
            return None


class _Figures:
    """What is measured of a family on its way."""

    def __init__(self) -> None:
        self.metrics: dict[str, float | None] = {}
        self.report: CacheReport | None = None

    def loaded(self, loaded: LoadedModel, reference: _Reference | None) -> None:
        """Measure a model that load_model accepted.

        Raises:
            _WrongError: If it says something else than the unmodified model.
        """
        if reference is None:
            raise _WrongError("it was accepted and cannot be made")
        model = loaded.model
        expected = reference.fed_as(model)
        for side, method in (("full_", FULL), ("lossless_", LOSSLESS), ("", EIGHT)):
            logits, self.report = _read(model, method)
            self.metrics[f"{side}logit_error"] = _apart(logits, expected)
        assert self.report is not None
        self.metrics |= {"layers": self.report.layers, "compressed_layers": self.report.compressed_layers}
        once, report = _read(model, FOUR, TOKENS - 1)  # one token more: windows let go of a long call then
        self.metrics["one_call_logit_error"] = _apart(once[:-1], _read(model, FULL, TOKENS - 1)[0][:-1])
        self.metrics["cache_bytes"] = report.bytes
        for side in ("full_", "lossless_", "one_call_"):
            _judge(self.metrics, f"{side}logit_error")
        if not self.report.compressed_tokens:
            raise _WrongError("nothing was compressed")
        self._compare_answers(model, reference)  # at last, since Qwen-VL keeps the rows of an answer in mind

    def _compare_answers(self, model: "PreTrainedModel", reference: _Reference) -> None:
        if reference.answers is None:  # MPT's generate() reads the prompt again with a cache that it is given
            return
        for side, method in (("lossless_", LOSSLESS), ("", EIGHT)):
            same = 100 * float((_answers(model, method) == reference.answers).double().mean())
            self.metrics[f"{side}same_tokens_pct"] = same
            if method is LOSSLESS and same < 100:
                raise _WrongError(f"only {same:.1f} % of the greedy tokens are the same")

    def own(self, model: "PreTrainedModel", reference: _Reference) -> None:
        """Attach a model as a user does; where it is refused, see that it is left as it was.

        Raises:
            _WrongError: If it says something else, attached or refused.
        """
        before = model.config.get_text_config(decoder=True)._attn_implementation
        try:
            attach(model)
        except DryRunError:
            if model.config.get_text_config(decoder=True)._attn_implementation != before:
                raise _WrongError("after the refusal another attention function is set") from None
            self._by_hand(model, reference)
            raise
        expected = reference.fed_as(model)
        self.metrics["own_lossless_logit_error"] = _apart(_read(model, LOSSLESS, TOKENS - 1)[0], expected)
        _judge(self.metrics, "own_lossless_logit_error")

    def _by_hand(self, model: "PreTrainedModel", reference: _Reference) -> None:
        """Whoever sets the attention function all the same hears a sentence, or the model says the same."""
        if reference.logits is None:
            return
        hf_attention.register()
        for method in (FULL, LOSSLESS):
            try:
                model.set_attn_implementation("turboquant")
                apart = _apart(_read(model, method)[0], reference.logits)
            except Exception:  # anything but silence
                continue
            if not apart <= LIMIT:
                raise _WrongError(
                    f"without a check: logits differ by {apart:.2g} standard deviations with {method}, and no word"
                ) from None

    def predict(self, folder: Path, detail: dict[str, Any]) -> None:
        """Note what its config.json says that the cache of `cache_bytes` takes."""
        try:
            self.metrics["estimated_bytes"] = predicted_bytes((folder / "config.json").read_text(), FOUR, TOKENS)
        except (ModelConfigError, SizingError) as error:
            detail["sizing"] = str(error)


def _judge(metrics: dict[str, float | None], name: str) -> None:
    apart = metrics[name]
    if apart is None or not apart <= LIMIT:
        raise _WrongError(f"{metric(name).title}: {apart:.2g} standard deviations")


def predicted_bytes(config: str, method: Method, tokens: int) -> int:
    """Return what a config.json says that a cache takes, of a model that runs in float32."""
    return kv_bytes(read_config(json.loads(config)), method, tokens, value_bytes=4).bytes


def _tokens(rows: int, count: int) -> Tensor:
    return torch.randint(3, 256, (rows, count), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _read(model: Any, method: Method, first: int = FIRST, chunk: int | None = None) -> tuple[Tensor, CacheReport]:
    """Return the logits of all tokens, the first ones read in one call and the others in chunks, or one by one."""
    ids, cache = _tokens(1, TOKENS), build_cache(model.config, method)
    pieces = (ids[:, :first], *ids[:, first:].split(chunk or (1 if feeds_singly(model) else CHUNK), dim=1))
    logits = [model(piece, past_key_values=cache).logits[0] for piece in pieces]
    return torch.cat(logits), cache_report(cache)


@torch.no_grad()
def _answers(model: Any, method: Method) -> Tensor:
    """Return the greedy answers to a left-padded batch."""
    ids = _tokens(len(PROMPTS), max(PROMPTS))
    places = torch.arange(max(PROMPTS))
    mask = torch.stack([places >= max(PROMPTS) - length for length in PROMPTS]).long()
    out = model.generate(
        ids * mask,
        attention_mask=mask,
        past_key_values=build_cache(model.config, method),
        max_new_tokens=ANSWER,
        min_new_tokens=ANSWER,
        do_sample=False,
        pad_token_id=0,
    )
    return torch.as_tensor(out[:, max(PROMPTS) :])


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().std())


FAMILY: Experiment[FamilySettings] = Experiment(
    "families", FamilySettings, run, check_methods=_check, model=False, methods=False, timed=True
)
