"""Which families work: tiny models of each, both ways in; every night all of them, otherwise the most used."""

import pytest
import torch
import transformers
from packaging.version import Version

from tests.support.families import REFUSED
from turboquant import hf_attention
from turboquant.cli.models import TOP
from turboquant.experiments import families
from turboquant.experiments.families import check_family
from turboquant.models.families import FAMILIES, Family, UnknownFamilyError, config_of, family_model

QUICK = list(FAMILIES)[:TOP]
OTHERS = [pytest.param(name, marks=pytest.mark.nightly) for name in list(FAMILIES)[TOP:]]


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer calls than the recorded check makes."""
    monkeypatch.setattr(families, "CHUNK", 20)
    monkeypatch.setattr(families, "ANSWER", 8)


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_a_family_works_or_is_refused_with_the_true_reason(name: str) -> None:
    found = check_family(FAMILIES[name])
    outcome, own = found.detail["outcome"], found.detail.get("own_outcome")
    if outcome == "unknown" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(found.detail["reason"])
    if name in REFUSED:
        assert (outcome, own) in (("refused", "refused"), ("refused", None)), found.detail
        assert REFUSED[name] in found.detail["reason"]
        return
    assert (outcome, own) == ("works", "works"), found.detail
    figures = found.metrics
    assert figures["one_call_logit_error"] == 0
    assert (figures["lossless_logit_error"] or 0) < 1e-4 < (figures["logit_error"] or 0) < 0.5
    assert name == "mpt" or figures["lossless_same_tokens_pct"] == 100
    assert 0 < (figures["compressed_layers"] or 0) <= (figures["layers"] or 0)


def test_a_family_that_transformers_does_not_know_is_named_in_words() -> None:
    with pytest.raises(UnknownFamilyError, match="knows it otherwise"):
        config_of(Family("llama", "", 1, "llama", {"num_attention_heads": 3, "hidden_size": 100}))
    for one in (
        Family("new", "something new", 5, "brand_new"),
        Family("new", "something new", 5, "llava", {"model_type": "brand_new"}, {"model_type": "clip_vision_model"}),
    ):
        found = check_family(one)
        assert found.detail["outcome"] == "unknown"
        assert "does not know 'brand_new'" in found.detail["reason"]


def test_the_same_weights_every_time() -> None:
    one, other = (family_model(FAMILIES["llama-3"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# -- what the check finds --------------------------------------------------------------------------------------------


def test_an_attention_that_says_something_else_is_found_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run is asked to believe it."""
    told = hf_attention.sdpa_attention_forward

    def doubled(module, query, key, value, mask, dropout=0.0, scaling=None, **more):
        return told(module, query, key, value, mask, dropout=dropout, scaling=2 * scaling, **more)

    monkeypatch.setattr(hf_attention, "sdpa_attention_forward", doubled)
    monkeypatch.setattr("turboquant.models.dry_run.LIMITS", {torch.float32: 100.0})
    found = check_family(FAMILIES["llama-3"]).detail
    assert (found["outcome"], found["own_outcome"]) == ("WRONG", "WRONG")
    assert "standard deviations" in found["reason"]


def test_a_crash_is_none_of_the_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(*args: object, **more: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(families, "load_model", crashes)
    found = check_family(FAMILIES["llama-3"]).detail
    assert (found["outcome"], found["reason"]) == ("CRASH", "AttributeError: no such thing")
    assert found["own_outcome"] == "works"


def test_a_refused_model_that_is_not_as_it_was_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model):
        model.set_attn_implementation("eager")
        raise families.DryRunError("no")

    monkeypatch.setattr(families, "attach", refuses)
    found = check_family(FAMILIES["llama-3"]).detail
    assert (found["own_outcome"], found["own_reason"]) == (
        "WRONG",
        "after the refusal another attention function is set",
    )


def test_configurations_keep_what_makes_the_family() -> None:
    assert config_of(FAMILIES["phi"]).hidden_size // config_of(FAMILIES["phi"]).num_attention_heads == 80
    assert config_of(FAMILIES["gemma3-text"]).head_dim == 256
    assert (
        config_of(FAMILIES["phi4-mini-hub"]).sliding_window
        > config_of(FAMILIES["phi4-mini-hub"]).max_position_embeddings
    )
    with pytest.raises(UnknownFamilyError):
        config_of(Family("new", "", 1, "brand_new"))
