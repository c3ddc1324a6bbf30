"""Known tokens through a cache, against a plain loop that feeds them one by one."""

import pytest
import torch

from tests.support.models import HF_FP8, Lossless, tokens
from turboquant.cache.build import build_cache, cache_report
from turboquant.methods import Method, parse_method
from turboquant.run.feed import answer_logits, feed, packing_runs, step

PROMPT, TEXT = tokens(2, 40, seed=1), tokens(2, 48, seed=2)
SPECS = (
    "full",
    "turboquant-paper:bits=2",
    "turboquant:bits=3,residual_length=8,group_size=32",
    "kivi:bits=2,residual_length=32",
    "rtn:bits=2,residual_length=16,sink_length=3",
    "hf-quanto:bits=2,residual_length=32",
    "hf-hqq:bits=2,residual_length=32",
    HF_FP8,
)


CLOSE = 1e-5
"""Half of the logits are nearer than this. Not all: a value between two codes may be rounded the other way."""


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().median())


def usable(spec: str) -> Method:
    method = parse_method(spec)
    try:
        method.check_available()
    except ImportError as error:
        pytest.skip(str(error))
    return method


def one_by_one(model, method: Method) -> tuple[torch.Tensor, int]:
    """The logits behind the prompt and behind every token of the text, and how many tokens are packed then."""
    cache = build_cache(model.config, method)
    with torch.no_grad():
        found = [model(PROMPT, past_key_values=cache).logits[:, -1]]
        found += [model(one, past_key_values=cache).logits[:, -1] for one in TEXT.split(1, dim=1)]
    return torch.stack(found, dim=1), cache_report(cache).compressed_tokens


@pytest.mark.parametrize("at_once", [None, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_runs_give_what_one_by_one_gives(llama, spec: str, at_once: int | None) -> None:
    method = usable(spec)
    cache = build_cache(llama.config, method)
    expected, packed = one_by_one(llama, method)
    assert apart(step(llama, cache, PROMPT), expected[:, 0]) < CLOSE
    runs = packing_runs(method, PROMPT.shape[1], TEXT.shape[1])
    places: list[int] = []
    found: list[torch.Tensor] = []
    for part, logits in feed(llama, cache, TEXT, runs, at_once):
        assert logits.shape[1] == part.stop - part.start <= (at_once or TEXT.shape[1])
        assert not logits.requires_grad
        found.append(logits)
        places += range(part.start, part.stop)
    assert places == list(range(TEXT.shape[1]))
    assert apart(torch.cat(found, dim=1), expected[:, 1:]) < CLOSE
    assert cache_report(cache).compressed_tokens == packed


@pytest.mark.parametrize("spec", ["turboquant-paper:bits=2", "kivi:bits=2,residual_length=32"])
def test_a_run_that_goes_on_where_the_method_packs_is_something_else(llama, spec: str) -> None:
    method = parse_method(spec)
    cache = build_cache(llama.config, method)
    step(llama, cache, PROMPT)
    [(part, logits)] = feed(llama, cache, TEXT, [(0, TEXT.shape[1])])
    assert part == slice(0, TEXT.shape[1])
    last = slice(-8, None)  # once the method has packed
    assert apart(logits[:, last], one_by_one(llama, method)[0][:, last]) > 1000 * CLOSE


@pytest.mark.parametrize("method", [Lossless(), parse_method("turboquant:bits=2,residual_length=8")], ids=str)
def test_an_answer_is_chosen_from_the_prompt_and_from_itself(llama, method: Method) -> None:
    cache = build_cache(llama.config, method)
    expected, _ = one_by_one(llama, method)
    runs = packing_runs(method, PROMPT.shape[1], TEXT.shape[1] - 1)
    found = list(answer_logits(llama, cache, PROMPT, TEXT, runs, 16))
    assert [place for part, _ in found for place in range(part.start, part.stop)] == list(range(TEXT.shape[1]))
    joined = torch.cat([logits for _, logits in found], dim=1)
    assert apart(joined, expected[:, :-1]) < CLOSE
    assert cache.get_seq_length() == PROMPT.shape[1] + TEXT.shape[1] - 1


def test_an_answer_of_one_token_needs_the_prompt_alone(llama) -> None:
    method = parse_method("turboquant-paper:bits=2")
    cache = build_cache(llama.config, method)
    [(part, logits)] = answer_logits(llama, cache, PROMPT, TEXT[:, :1], packing_runs(method, PROMPT.shape[1], 0))
    assert part == slice(0, 1)
    assert logits.shape[:2] == (2, 1)
    assert cache.get_seq_length() == PROMPT.shape[1]


def test_options_go_to_the_model(llama) -> None:
    """Pads in front of a row change nothing for it."""
    method = parse_method("full")
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[:, :4] = 0
    padded = torch.cat([PROMPT.new_zeros(2, 4), PROMPT], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    options = {"attention_mask": mask, "position_ids": positions}
    found = step(llama, build_cache(llama.config, method), padded, **options)
    assert apart(found, step(llama, build_cache(llama.config, method), PROMPT)) < CLOSE
