"""One visitor's conversation: two caches that live from turn to turn, whatever model is resident in between."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from app.config import AppConfig
from app.engine.job import Job, Request
from app.tab.examples import BY_NAME, LONG_EXAMPLE
from app.tab.requests import Choices, RequestError, check_loading, check_prompt, method_text, sampling_settings
from turboquant.methods import parse_method
from turboquant.records.comparison import Settings

if TYPE_CHECKING:
    from app.tab.results import Results
    from turboquant.run.chat import Session, Turn
    from turboquant.run.compare import Event

SideName = Literal["original", "compressed"]
SIDES: tuple[SideName, SideName] = ("original", "compressed")
MAX_TURNS = 40


@dataclass(frozen=True)
class Opening:
    """A first message that is long enough for packing to start early; `then` are messages that go on well from it."""

    prompt: str
    then: str


_TEXT = BY_NAME[LONG_EXAMPLE].prompt.split("\n\n", 1)[1]
# The names stand in the address and on the pills as they are.
OPENINGS = {
    "A story to go on with": Opening(
        "Let us write a story together, a few sentences at a time. This is how it begins: Every evening at six the "
        "keeper Ilse Marn climbed the ninety-one steps of the lighthouse at Sorrel Point, wound the clock, trimmed the "
        "lamp and wrote one line about the weather. In thirty years she had never missed a day, and nobody had ever "
        "read the book. On the last evening of November she found that a line had already been written under the "
        "date, in green ink and in a hand that was not hers. It said: calm sea, two boats, do not light the lamp. "
        "Go on with the story, and stop at a moment where something must be decided.",
        "Go on: what does she decide, and why?",
    ),
    "A chain of facts": Opening(
        "Remember these facts; I will ask about them. Mara keeps bees and lives in the yellow house. The house is "
        "next to the bakery. The bakery belongs to Jonas, who is Mara's uncle. Jonas bakes rye bread on Tuesdays "
        "and sells it to the ferry. The ferry leaves at seven and is steered by Petra. Petra is allergic to honey. "
        "Tomas repairs the ferry's engine and rents a room above the bakery. His dog, called Biscuit, is afraid of "
        "bees. On Sundays all of them have breakfast together in the yellow house. Now list the people, each with one "
        "fact about them.",
        "Who should not eat what Mara makes, and what is that person's work?",
    ),
    "A long text to discuss": Opening(
        f"Read this text; we will discuss it. First say in two sentences what it is about.\n\n{_TEXT}",
        "Why did the first harbour fail, and who found out?",
    ),
}


class Conversation:
    """A session of the library that holds its model only while a turn is computed.

    Pages read `turns`; the worker thread calls `ask`. `fork` and `close` are for pages while no turn is at work.

    Attributes:
        turns: The turns that were answered, oldest first.
        forks: Which side's answers both continued with, by the index of the turn that followed.
        held_bytes: What the original and the compressed cache hold now, measured after the last call.
    """

    def __init__(self, model: str, weights: str, method: str, chat: bool) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.model, self.weights, self.method, self.chat = model, weights, method, chat
        self.turns: tuple[Turn, ...] = ()
        self.forks: dict[int, SideName] = {}
        self.held_bytes: tuple[int, int] = (0, 0)
        self._session: Session | None = None

    @property
    def fixed(self) -> tuple[str, str, str, bool]:
        """What the first turn has settled: model, weights, method and chat template."""
        return self.model, self.weights, self.method, self.chat

    @property
    def forked(self) -> SideName | None:
        """The side whose answers both go on with at the next turn, if that was chosen since the last one."""
        return self.forks.get(len(self.turns))

    @property
    def parted(self) -> bool:
        """Do the two sides hold different conversations, as far as their answers tell?"""
        since = max(self.forks, default=0)
        return any(turn.comparison.original.text != turn.comparison.compressed.text for turn in self.turns[since:])

    def ask(
        self,
        loaded: Any,
        prompt: str,
        settings: Settings,
        on_event: "Callable[[Event], None]",
        cancelled: Callable[[], bool],
    ) -> "Turn":
        """Put a prompt to both sides (worker thread).

        Raises:
            PromptError: The prompt is empty, the conversation does not fit the model's context, or the model is no
                longer the one that the caches were made with.
        """
        from turboquant.run.chat import Session

        if self._session is None:
            self._session = Session(loaded, parse_method(self.method), self.chat)
        else:
            self._attach(self._session, loaded)
        try:
            return self._session.ask(prompt, settings, on_event=on_event, cancelled=cancelled)
        finally:
            self._session.detach()
            self.turns = tuple(self._session.turns)
            self.held_bytes = _held(self._session)

    @staticmethod
    def _attach(session: "Session", loaded: Any) -> None:
        from turboquant.run.compare import PromptError

        try:
            session.attach(loaded)
        except ValueError as error:
            raise PromptError(f"{error} Start a new conversation.") from None

    def fork(self, side: SideName) -> None:
        """Make one side's conversation the context of both for the next turn."""
        if self._session is not None and self.turns:
            self._session.fork(side)
            self.forks[len(self.turns)] = side

    def close(self) -> None:
        """Forget everything and free both caches."""
        self._session, self.turns, self.forks, self.held_bytes = None, (), {}, (0, 0)


def _held(session: "Session") -> tuple[int, int]:
    from turboquant.cache.build import cache_report

    original, compressed = (cache_report(session.cache(side)).bytes for side in SIDES)
    return original, compressed


@dataclass(frozen=True, kw_only=True)
class TurnRequest(Request):
    """The next turn of a conversation held in both caches; the result is a Turn."""

    title: str = "Session"
    page: str = "session"
    short: ClassVar[bool] = True
    conversation: Conversation
    prompt: str
    settings: Settings

    @property
    def sides(self) -> int:
        """The original and the compressed one."""
        return 2

    def key(self, item: int) -> str | None:
        """A turn depends on what the caches hold, so it is computed each time."""
        del item
        return None

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        """Put the prompt to both sides."""
        del yielding
        job.add(0, self.conversation.ask(loaded, self.prompt, self.settings, job.publish, cancelled))

    def keep(self, tab: "Results", job: Job, item: int) -> str | None:
        """Nothing: the conversation has its turns."""
        del tab, job, item
        return None

    def prompt_tokens(self, result: Any) -> int:
        """Those of the turn's prompt."""
        return int(result.comparison.prompt_tokens)


def begin(choices: Choices, config: AppConfig) -> Conversation:
    """A conversation with the sidebar's settings, checked.

    Raises:
        RequestError: One of them cannot be run.
    """
    model, weights = check_loading(choices, config)
    return Conversation(model, weights, method_text(choices), bool(choices.chat))


def turn_request(talk: Conversation, prompt: object, choices: Choices, config: AppConfig) -> TurnRequest:
    """The next turn; how the answers are chosen is the sidebar's, the rest is the conversation's.

    Raises:
        RequestError: The prompt or a setting cannot be run, or the conversation is as long as it may be.
    """
    if len(talk.turns) >= MAX_TURNS:
        raise RequestError(f"A conversation has at most {MAX_TURNS} turns here; export this one and start a new one.")
    settings = sampling_settings(choices, config)
    return TurnRequest(
        model=talk.model,
        weights=talk.weights,
        private=frozenset({0}),  # a conversation is the visitor's own
        methods=(talk.method,),
        conversation=talk,
        prompt=check_prompt(prompt, config),
        settings=settings,
    )
