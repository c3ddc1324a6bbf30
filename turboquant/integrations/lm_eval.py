"""lm-evaluation-harness over a compressed cache: its model class `turboquant` (extra `lm-eval`).

The harness's own class `hf` takes a continuation's log-likelihood from one forward call over context and continuation.
In such a call every token attends to exact keys and values, so no cache, however coarse, changes the result. Here

- the context but for its last token is read into the cache in calls of `chunk_tokens`; after each call the cache packs
  what is due, and later calls read it from codes;
- the last token of the context and the continuation are then fed as decoding feeds them: every scored token is
  predicted from the cache as decoding would find it, packed tokens read from their codes;
- `loglikelihood_rolling` cuts texts as the harness does (disjoint windows of the model's context, each behind one
  token) and scores all of a window in that way: nothing is read ahead;
- `generate_until` reads the context in the same way, and generates with transformers' own `generate()`.

With the method `full` all of them give what `hf` gives, up to rounding. Rows go through the model one by one; the
continuations of one context share its reading. A task in which no token was scored from packed ones is refused:
its figures would be those of the full cache.

    turboquant-lm-eval run --model turboquant --model_args pretrained=smollm2-135m method=turboquant:bits=3 --tasks ...
"""

import copy
import itertools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache

from turboquant.cache.build import NothingCompressedError, cache_report
from turboquant.methods import Method, parse_method
from turboquant.models.load import LoadedModel, ModelError, load_model
from turboquant.run.scoring import read_context, score_continuation

__all__ = ["CacheUse", "ModelArgumentError", "TurboQuantLM", "main"]

logger = logging.getLogger(__name__)

OF_THE_HARNESS = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "max_length",
    "prefix_token_id",
    "think_end_token",
    "truncation",
)
"""Arguments of the harness's class `hf` that keep their meaning here."""
Answer = TypeVar("Answer")
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class ModelArgumentError(ValueError):
    """An argument of the model class is not known or has a wrong value."""


@dataclass
class CacheUse:
    """What part the compressed cache had in the figures of one task.

    Attributes:
        requests: Texts scored or answered; a rolling log-likelihood counts its windows.
        requests_on_packed: Those with at least one token predicted while the cache held packed tokens.
        tokens: Tokens scored or generated.
        tokens_on_packed: Those predicted while the cache held packed tokens.
        cache_tokens: Tokens of the longest cache.
        packed_tokens: How many of these were packed.
        bits_per_value: All its bytes in bits, over its values.
    """

    requests: int = 0
    requests_on_packed: int = 0
    tokens: int = 0
    tokens_on_packed: int = 0
    cache_tokens: int = 0
    packed_tokens: int = 0
    bits_per_value: float | None = None

    def add(self, cache: Cache, tokens: int, on_packed: int) -> None:
        """Count one request, by its cache as it was left."""
        self.requests += 1
        self.requests_on_packed += on_packed > 0
        self.tokens += tokens
        self.tokens_on_packed += on_packed
        if cache.get_seq_length() > self.cache_tokens:
            report = cache_report(cache)
            self.cache_tokens, self.packed_tokens = report.tokens, report.compressed_tokens
            self.bits_per_value = report.bits_per_value


@register_model("turboquant")
class TurboQuantLM(HFLM):
    """A model whose KV cache is compressed, for the harness; see this module's text for what is scored from what.

    Args:
        pretrained: Name of a model, hub id, folder or GGUF file, as in `load_model`; or a model that it returned.
        method: As for `parse_method`. Several options need JSON, quotes or a dict around them, since the harness
            splits its arguments at commas: `--model_args '{"method": "turboquant:key_bits=4,value_bits=2"}'`.
        weights: Precision of the model, as in `load_model`.
        device: "auto", "cpu", "cuda" or "cuda:<index>"; where there is no GPU, "cuda:0" too is the CPU.
        chunk_tokens: Tokens of a context that are read in one call, at least 1.
        allow_unpacked: Warn of tasks whose figures no packed token had a part in, instead of refusing them.
        **options: `batch_size` (only 1), and the arguments named in `OF_THE_HARNESS`, which go to the harness's class.

    Attributes:
        cache_use: By the name of the task; the results' `config` holds it as well.

    Raises:
        ModelArgumentError: If an argument is not known or has a wrong value.
        ModelError: If the model cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel = "smollm2-135m",
        method: str | Method = "turboquant:bits=4",
        weights: str = "auto",
        device: str = "auto",
        chunk_tokens: int = 512,
        allow_unpacked: bool = False,
        **options: Any,
    ) -> None:
        _check(chunk_tokens, options)
        try:
            self.method = parse_method(method) if isinstance(method, str) else method
        except ValueError as error:
            raise ModelArgumentError(str(error)) from error
        if device == "cuda:0" and not torch.cuda.is_available():
            device = "auto"  # the harness's command line asks for cuda:0 unless it is told otherwise
        loaded = load_model(pretrained, weights=weights, device=device) if isinstance(pretrained, str) else pretrained
        passed_on = {name: options[name] for name in OF_THE_HARNESS if name in options}
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", **passed_on)
        self.loaded = loaded
        self.chunk_tokens = chunk_tokens
        self.allow_unpacked = allow_unpacked
        self.cache_use: dict[str, CacheUse] = {}
        self._use = CacheUse()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation after its context, and whether it is the greedy one.

        Raises:
            NothingCompressedError: If no token of a task was scored from packed ones.
        """
        score = super().loglikelihood
        return self._by_task(requests, self._pair_length, lambda some: score(some, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in disjoint windows of the model's context.

        Raises:
            NothingCompressedError: If no token of a task was scored from packed ones.
        """
        return self._by_task(requests, self._text_length, lambda some: self._rolling(some, disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model answers to each context, up to a stop sequence.

        Raises:
            NothingCompressedError: If no token of a task was generated from packed ones.
        """
        generate = super().generate_until
        return self._by_task(requests, self._answer_length, lambda some: generate(some, disable_tqdm))

    def get_model_info(self) -> dict[str, Any]:
        """Return what goes into the results' `config`: the model, the method, and the part the cache had."""
        spec = self.loaded.spec
        return {
            "model_name": spec.name,
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": spec.revision or "",
            "weights": self.loaded.weights,
            "method": str(self.method),
            "chunk_tokens": self.chunk_tokens,
            "cache_use": {task: asdict(use) for task, use in self.cache_use.items()},
        }

    def _by_task(
        self,
        requests: list[Instance],
        length: Callable[..., int],
        answer: Callable[[list[Instance]], list[Answer]],
    ) -> list[Answer]:
        """Answer each task's requests by themselves, and count what the cache did for it; the order stays.

        Tasks too short for anything to be packed are refused before any is computed. `length` gives the tokens that
        stand before the last one fed, at most, from a request's arguments.
        """
        places: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            places.setdefault(request.task_name or "", []).append(i)
        for task, found in places.items():
            longest = max(min(length(*requests[i].args), self.max_length - 1) for i in found)
            if self.method.compresses and not self.method.packs(longest):
                self._nothing_packed(task, f"packs none of the {longest:,} tokens of its longest request")
        answers: dict[int, Answer] = {}
        for task, found in places.items():
            self._use = self.cache_use.setdefault(task, CacheUse())
            answers.update(zip(found, answer([requests[i] for i in found]), strict=True))
            self._check_use(task)
        return [answers[i] for i in range(len(requests))]

    def _pair_length(self, context: str, continuation: str) -> int:
        return len(self.tok_encode(context + continuation)) + (not context) - 2

    def _text_length(self, text: str) -> int:
        return len(self.tok_encode(text)) - 1

    def _answer_length(self, context: str, settings: dict[str, Any]) -> int:
        more: int = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        return min(len(self.tok_encode(context)), self.max_length - more) + more - 2

    def _check_use(self, task: str) -> None:
        """Say so where part of a task, or all of it, had nothing to do with packed tokens."""
        use = self._use
        if not self.method.compresses or use.requests_on_packed == use.requests:
            return
        if not use.requests_on_packed:
            self._nothing_packed(
                task, f"had packed none of at most {use.cache_tokens:,} tokens when the last one was read"
            )
        else:
            logger.warning(
                "task %s: %d of %d requests were too short for %s to pack a token in time; their part of the result is "
                "the full cache's",
                task,
                use.requests - use.requests_on_packed,
                use.requests,
                self.method,
            )

    def _nothing_packed(self, task: str, why: str) -> None:
        text = f"task {task}: {self.method} {why}, so its figures are those of the full cache"
        if not self.allow_unpacked:
            raise NothingCompressedError(f"{text} (more shots, longer texts or a smaller residual_length would help)")
        logger.warning(text)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations, in order; those of one context that follow each other share its reading."""
        results = []
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc=f"Scoring through {self.method}")
        fitting = [(request, self._context(context, more), more) for request, context, more in requests]
        for ids, group in itertools.groupby(fitting, key=lambda one: one[1]):
            alike = list(group)
            context = torch.tensor([ids], device=self.device)
            read = read_context(self.model, self.method, context[:, :-1], self.chunk_tokens)
            for request, _, continuation in alike:
                cache = copy.deepcopy(read) if len(alike) > 1 else read
                targets = torch.tensor([continuation], device=self.device)
                score = score_continuation(self.model, self.method, cache, context[:, -1:], targets)
                self._use.add(cache, score.tokens, score.on_packed)
                result = score.log_likelihood, score.greedy
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, result)
                results.append(result)
                progress.update()
        progress.close()
        return results

    def _context(self, context: list[int], continuation: list[int]) -> list[int]:
        """Return the end of a context that fits into the model's own together with a continuation, as in `hf`."""
        room = self.max_length + 1 - len(continuation)
        if not context or not continuation or room < 1:
            raise ValueError(
                f"a request needs a context and a continuation of 1 to {self.max_length} tokens, got "
                f"{len(context)} and {len(continuation)}"
            )
        if len(context) > room:
            logger.warning("%d tokens at the start of a context do not fit and are left out", len(context) - room)
        return context[-room:]

    def _rolling(self, requests: list[Instance], disable_tqdm: bool) -> list[float]:
        """Score whole texts, cut as the harness cuts them."""
        windows: list[list[Request]] = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows.append([(None, *make_disjoint_window(window)) for window in rolling])
        scores = iter(self._loglikelihood_tokens([one for some in windows for one in some], disable_tqdm))
        totals = [sum(next(scores)[0] for _ in some) for some in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Generate from one context (1, n), of which all but the last token is read first."""
        if settings.get("num_beams", 1) != 1 or settings.get("num_return_sequences", 1) != 1:
            raise ModelArgumentError("the model class turboquant generates one answer: no beams, no several sequences")
        cache = read_context(self.model, self.method, context[:, :-1], self.chunk_tokens)
        read = context.shape[1] - 1
        packed_before = cache_report(cache).compressed_tokens > 0
        answer = super()._model_generate(context, max_length, stop, past_key_values=cache, **settings)
        count = answer.shape[1] - context.shape[1]
        if packed_before or not cache_report(cache).compressed_tokens:
            on_packed = count if packed_before else 0
        else:
            on_packed = sum(self.method.packs(read + step) for step in range(count))
        self._use.add(cache, count, on_packed)
        return answer


def _check(chunk_tokens: object, options: dict[str, Any]) -> None:
    """Refuse arguments that are not known or cannot be kept."""
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ModelArgumentError(f"chunk_tokens must be a whole number, 1 or more, got {chunk_tokens!r}")
    if str(options.get("batch_size", 1)) != "1":
        raise ModelArgumentError(f"batch_size must be 1 (rows go through one by one), got {options['batch_size']!r}")
    unknown = sorted(set(options) - {*OF_THE_HARNESS, "batch_size", "max_batch_size"})
    if unknown:
        raise ModelArgumentError(
            f"the model class turboquant has no argument {unknown[0]}; options of a method belong into its string, and "
            'where there are several that into JSON: \'{"method": "turboquant:key_bits=4,value_bits=2"}\''
        )


def main() -> str | None:
    """Run the harness's command line with the model class `turboquant` known to it; return what went wrong."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ModelArgumentError, ModelError, NothingCompressedError) as error:
        return f"turboquant-lm-eval: {error}"
    return None
