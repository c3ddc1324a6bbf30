"""The token loop: what it draws, where it ends and which prompts it takes, against the library's own `generate`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from tests.support.models import AttentionCalls, tiny_loaded, tiny_tokenizer
from turboquant.cache.build import build_cache
from turboquant.kernels.scoring import Scoring
from turboquant.methods import METHODS, parse_method
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import Settings
from turboquant.run.compare import compare
from turboquant.run.generate import (
    Generation,
    PromptError,
    QueryRecorder,
    conversation_ids,
    generate_in_turn,
    logits_processors,
    prompt_ids,
)

PROMPT = "The tide turns slowly and the boats wait. " * 3  # 126 tokens
FULL, PAPER_2 = parse_method("full"), parse_method("turboquant-paper:bits=2")
SHORT = Settings(max_new_tokens=16)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    with torch.no_grad():
        return tiny_loaded()


def answer(loaded: LoadedModel, settings: Settings, spec: str = "full") -> Generation:
    cache = build_cache(loaded.model.config, parse_method(spec))
    generation = Generation(loaded, prompt_ids(loaded, PROMPT), cache, settings, QueryRecorder(keep=False))
    generate_in_turn([generation], lambda _: None)
    return generation


@pytest.mark.parametrize("spec", ["full", "turboquant-paper:bits=2", "turboquant:bits=3,residual_length=8"])
def test_greedy_answers_are_those_of_the_library(loaded: LoadedModel, spec: str) -> None:
    model: Any = loaded.model
    ids, method = prompt_ids(loaded, PROMPT), parse_method(spec)
    output = model.generate(
        ids, past_key_values=build_cache(loaded.model.config, method), max_new_tokens=16, do_sample=False
    )
    assert output[0, ids.shape[1] :].tolist() == answer(loaded, SHORT, spec).tokens


# -- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 1.7, "top_k": 20, "top_p": 0.8}],
    ids=str,
)
def test_sampling_draws_what_the_library_draws(loaded: LoadedModel, options: dict[str, float]) -> None:
    """Token by token the answer of `generate`, whose global generator is seeded alike."""
    used: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    tokens = answer(loaded, Settings(max_new_tokens=16, seed=3, **used)).tokens
    model: Any = loaded.model
    ids = prompt_ids(loaded, PROMPT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        output = model.generate(ids, max_new_tokens=16, do_sample=True, **used)
    assert tokens == output[0, ids.shape[1] :].tolist()[: len(tokens)]
    assert len(tokens) > 10
    assert len(logits_processors(Settings(**used))) == 1 + ("top_k" in options) + ("top_p" in options)


def test_both_sides_draw_alike_and_seeds_differ(loaded: LoadedModel) -> None:
    sides = [compare(loaded, PROMPT, FULL, Settings(max_new_tokens=16, temperature=1, seed=seed)) for seed in (1, 2, 1)]
    assert all(result.original.text == result.compressed.text for result in sides)
    assert sides[0].original.text != sides[1].original.text
    assert sides[0].original.text == sides[2].original.text


def test_the_global_generator_is_left_alone(loaded: LoadedModel) -> None:
    before = torch.get_rng_state()
    compare(loaded, PROMPT, parse_method("turboquant-paper:bits=3,seed=77"), Settings(max_new_tokens=4, temperature=1))
    assert torch.equal(torch.get_rng_state(), before)


# -- where an answer ends ----------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_before_it(loaded: LoadedModel) -> None:
    whole = answer(loaded, SHORT)
    assert whole.finish == "length"
    stop = whole.text[4:6]
    assert whole.text.index(stop) == 4
    stopped = answer(loaded, Settings(max_new_tokens=16, stop=("never there", stop)))
    assert (stopped.text, stopped.finish) == (whole.text[:4], "stop")
    assert stopped.tokens == whole.tokens[:6]


@pytest.mark.parametrize("as_list", [False, True])
def test_the_end_token_ends_the_answer_and_is_no_part_of_it(as_list: bool) -> None:
    whole = answer(tiny_loaded(), SHORT).tokens
    end = next(i for i, token in enumerate(whole) if i > 1 and token not in whole[:i])
    loaded = tiny_loaded()
    assert loaded.model.generation_config is not None
    loaded.model.generation_config.eos_token_id = [250, whole[end]] if as_list else whole[end]
    stopped = answer(loaded, SHORT)
    assert (stopped.tokens, stopped.finish) == (whole[:end], "stop")
    assert len(stopped.cache_bytes) == end + 1  # the call that gave the end token counts


# -- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  \n\t "])
def test_an_empty_prompt_is_refused(loaded: LoadedModel, prompt: str) -> None:
    with pytest.raises(PromptError, match="prompt is empty"):
        compare(loaded, prompt, PAPER_2, SHORT)


def test_a_prompt_that_does_not_fit_names_the_numbers(loaded: LoadedModel) -> None:
    calls = AttentionCalls(loaded)
    settings = Settings(max_new_tokens=1387)
    with pytest.raises(PromptError, match=r"prompt has 126 tokens and up to 1,387 more .* context of 512 tokens"):
        compare(loaded, PROMPT, PAPER_2, settings)
    with pytest.raises(PromptError, match="up to 387 more"):
        compare(loaded, PROMPT, PAPER_2, Settings(max_new_tokens=512 - 126 + 1))
    assert not calls.layers


def test_a_prompt_that_just_fits_runs() -> None:
    result = compare(tiny_loaded(max_position_embeddings=142), PROMPT, PAPER_2, SHORT)
    assert result.original.finish == "length"


def test_the_chat_template_is_used_unless_it_is_turned_off() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
    )
    loaded = tiny_loaded(chat_template=template)
    decoded = [loaded.tokenizer.decode(prompt_ids(loaded, "Hello", chat)[0].tolist()) for chat in (True, False)]
    assert decoded == ["[user]Hello[me]", "Hello"]
    on, off = (compare(loaded, PROMPT, FULL, Settings(max_new_tokens=8), chat=chat) for chat in (True, False))
    assert (on.prompt_tokens, off.prompt_tokens) == (126 + 10, 126)
    assert (on.chat, off.chat) == (True, False)
    assert on.original.token_ids != off.original.token_ids


UNUSABLE = {
    "{{ raise_exception('System role not supported') }}": r"cannot be used \(System role not supported\): leave it out",
    "": None,  # no template
    " ": "does not hold the prompt",
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}": "does not hold the prompt",
    "{{ messages[0].content[:3] }}": "does not hold the prompt",
    "{{ messages[0].content.text }}": "does not hold the prompt",
    "{{ tools.first.name }}": "cannot be used .*'first'",
    "{{ user_name.first }}": r"cannot be used \('user_name' is undefined",
    "{{ 1 / 0 }}": r"cannot be used \(division by zero",
    "{% for m in messages %}": r"cannot be used \(Unexpected end of template",
    "{% for i in range(1000000) %}{% endfor %}": r"cannot be used \(Range too big",
    "{{ messages[0].__class__.__mro__ }}": r"cannot be used \(access to attribute '__class__'",
}


@pytest.mark.parametrize("template", UNUSABLE)
def test_a_template_that_fails_or_loses_the_prompt_is_refused_in_one_sentence(template: str) -> None:
    loaded, message = tiny_loaded(chat_template=template), UNUSABLE[template]
    if message is None:
        assert prompt_ids(loaded, "Hello").shape == (1, 5)
        return
    with pytest.raises(PromptError, match=message) as refused:
        prompt_ids(loaded, "Hello")
    assert "--no-chat-template" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert prompt_ids(loaded, "Hello", chat=False).shape == (1, 5)


def test_templates_by_name_need_a_default() -> None:
    loaded = tiny_loaded(chat_template="")
    loaded.tokenizer.chat_template = {"rag": "{{ messages[0].content }}", "tool_use": "x"}
    with pytest.raises(PromptError, match=r"cannot be used \(none of rag, tool_use is called default"):
        prompt_ids(loaded, "Hello")
    loaded.tokenizer.chat_template["default"] = "({{ messages[0].content }})"
    assert prompt_ids(loaded, "Hello").shape == (1, 7)


@pytest.mark.parametrize(
    "template", ["<<{{ messages[-1].content | trim }}>>", "{{ messages[0].content.split() | join(' ') }}"]
)
def test_a_template_may_trim_what_it_is_given(template: str) -> None:
    loaded = tiny_loaded(chat_template=template)
    assert "two lines" in loaded.tokenizer.decode(prompt_ids(loaded, "  two lines\n")[0].tolist())


def test_the_ids_are_those_of_the_library() -> None:
    template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{{ '[me]' if add_generation_prompt }}"
    )
    loaded = tiny_loaded(chat_template=template)
    messages = [
        {"role": "user", "content": "a</s>b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    tokenizer: Any = loaded.tokenizer
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert torch.equal(conversation_ids(loaded, messages), expected["input_ids"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" \n", "The prompt is empty"),
        ("caf\udce9", "The prompt must be text: it has bytes that are not valid UTF-8"),
        ("\ud83d", "The prompt must be text"),
        ("a\0", "The prompt must be text: it has null characters"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(loaded: LoadedModel, prompt: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        prompt_ids(loaded, prompt)


def test_a_prompt_of_which_the_tokenizer_leaves_nothing_is_refused(loaded: LoadedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(PromptError, match="The prompt has no tokens"):
        prompt_ids(replace(loaded, tokenizer=tokenizer), "xxx")


def test_a_model_without_a_template_reads_the_plain_prompt(loaded: LoadedModel) -> None:
    assert torch.equal(prompt_ids(loaded, "Hello", chat=True), prompt_ids(loaded, "Hello", chat=False))


def test_generations_of_any_number_advance_in_turn(loaded: LoadedModel) -> None:
    """One side alone runs too, and those that end early wait for nobody."""
    ids = prompt_ids(loaded, PROMPT)
    lengths = (3, 1, 5)
    generations = [
        Generation(
            loaded,
            ids,
            build_cache(loaded.model.config, METHODS["full"]()),
            Settings(max_new_tokens=length),
            QueryRecorder(keep=False),
        )
        for length in lengths
    ]
    order: list[int] = []
    generate_in_turn(generations, order.append)
    assert order == [0, 1, 2, 0, 2, 0, 2, 2, 2]
    assert [len(generation.tokens) for generation in generations] == list(lengths)
    assert all(not generation.recorder.queries for generation in generations)


def test_the_recorder_keeps_the_last_query_and_not_the_prompts() -> None:
    """A view of the last row would hold the queries of the whole prompt in memory, in every layer."""
    recorder = QueryRecorder()
    query = torch.randn(1, 4, 300, 64)
    recorder.record(0, query, Scoring(0.125))
    (kept,) = recorder.queries[0]
    assert torch.equal(kept, query[:, :, -1:])
    assert kept.untyped_storage().nbytes() == 4 * 64 * 4
