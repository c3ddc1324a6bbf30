"""Requests as the pages make them, in one line."""

from app.compare.request import CompareRequest
from app.prompts.request import PromptsRequest
from app.tab.examples import own
from turboquant.records.comparison import Settings

METHOD = "turboquant:bits=4"


def compare_asked(prompt: str, settings: Settings, model: str = "a", *methods: str) -> CompareRequest:
    return CompareRequest(
        model=model,
        weights="auto",
        private=own([prompt]),
        prompt=prompt,
        methods=methods or (METHOD,),
        settings=settings,
    )


def prompts_asked(
    prompts: tuple[str, ...], settings: Settings, model: str = "a", method: str = METHOD
) -> PromptsRequest:
    return PromptsRequest(
        model=model, weights="auto", private=own(prompts), prompts=prompts, methods=(method,), settings=settings
    )
