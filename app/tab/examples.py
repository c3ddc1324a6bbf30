"""Prompts that show something: each is one pill under the prompt box."""

from collections.abc import Sequence
from dataclasses import dataclass

_HARBOUR = """\
The harbour of Arnsey was built twice. The first one, finished in 1782, was a single stone arm that reached
out from the north shore and sheltered perhaps thirty fishing boats. It was paid for by a tax on salt, and
because the salt came from the south shore, the people there never forgave it. In the winter of 1809 a storm
that lasted four days broke the arm in three places, and for eleven years the town had no harbour at all.
Boats were dragged up the beach by horses, and the herring trade moved to Kellin, twelve miles east.

The second harbour was the work of Margaret Oyne, a surveyor's daughter who had taught herself the use of tide
tables. She showed that the first arm had failed because it faced the current instead of the waves, and she
proposed two short arms that overlapped, with the gap turned away from the open sea. The town council laughed
at the plan twice and accepted it the third time, mostly because it was cheap: the stones of the old arm could
be used again. Work began in the spring of 1820 with sixty men and one steam crane, the first ever seen on
that coast. The crane sank in the second year, was raised, and sank again; it still lies under the east arm,
where divers visit it.

When the harbour opened in 1826 it held two hundred boats. The herring trade came back within five years, and
with it came a ropeworks, a smokehouse and a school of navigation that trained three generations of pilots.
The salt tax was abolished in 1831, and the south shore built its own slipway in 1840, which was named, after
a long argument, the Peace.

Today the fishing fleet is down to nine boats. The harbour earns its living from ferries, from a small yard
that repairs wooden hulls, and from visitors who come to see the overlapping arms at low tide, when the old
stones with their salt-tax marks can be read. The council is debating whether to raise the arms by one metre,
because the highest tides now wash over them several times each winter. Engineers say that Oyne's gap still
faces the right way."""

_LEDGER = """\
Read the warehouse log and answer the question at its end.

Monday: forty crates of lamp oil came in from the river barge and were stacked on the left wall. Two were
leaking and were sent back. The night watch saw nothing unusual. Tuesday: a cart took twelve crates to the
hill village. The driver signed for thirteen, which was corrected before he left. It rained all day and the
yard flooded to the second step. Wednesday: no deliveries. The roof over the west corner was mended with slate
from the old mill. Thursday: the inspector came and counted everything twice. He found one crate of candles
that was in no book, and he wrote its number down. The special magic number is 7391. Friday: eighteen sacks of
barley arrived wet and were laid out to dry on the upper floor. The cat had five kittens behind the scales.
Saturday: the river rose again and the barge could not land, so the men went home at noon. Sunday: the
watchman changed the lock on the side door and gave the new key to the clerk, who hung it beside the clock.
Monday: the barge came at last with glass, rope and tar. Four panes of glass were broken and paid for. The
inspector sent a letter to say that the candles belonged to the chapel, and they were carried over the same
evening. Tuesday: twenty ropes were sold to the ferry. The clerk balanced the book and found it right to the
last coin. Wednesday: snow fell before sunrise and the road over the hill was closed until evening.

What is the special magic number?"""


def _unwrapped(text: str) -> str:
    """Paragraphs as single lines."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


@dataclass(frozen=True)
class Example:
    """A prompt with the short name its pill and the link to it carry."""

    name: str
    label: str
    prompt: str


EXAMPLES = (
    Example(
        "fact",
        "A fact, explained",
        "Why is the sky blue? Explain it to a curious ten-year-old in three short paragraphs.",
    ),
    Example(
        "code",
        "Code",
        "Write a Python function that returns the n-th Fibonacci number without recursion. "
        "Then explain each line and give two examples of calling it.",
    ),
    Example("summary", "Long summary", f"Summarise this text in five sentences.\n\n{_unwrapped(_HARBOUR)}"),
    Example(
        "arithmetic",
        "Arithmetic",
        "A shop sells pens at 3 coins each and notebooks at 7 coins each. Ada buys 12 pens and 5 notebooks "
        "and pays with 100 coins. How many coins does she get back? Work it out step by step, then check the result.",
    ),
    Example("needle", "Needle", _unwrapped(_LEDGER)),
)
BY_NAME = {example.name: example for example in EXAMPLES}
LONG_EXAMPLE = "summary"


def name_of(prompt: str) -> str | None:
    """The name of the example with exactly this prompt."""
    return next((example.name for example in EXAMPLES if example.prompt == prompt), None)


def own(prompts: Sequence[str]) -> frozenset[int]:
    """Which of some prompts a visitor wrote: those that are no example."""
    return frozenset(i for i, prompt in enumerate(prompts) if name_of(prompt) is None)
