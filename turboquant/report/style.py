"""How methods look in figures: their own colour and sign, the same on a page and in the report that it offers."""

from collections.abc import Iterable

from turboquant.methods import METHODS, Method

_VARIANTS = ("star", "cross", "hexagon", "bowtie")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def looks(families: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str, str]]:
    """Return colour, sign and dash of each family; options of one method share its colour.

    Args:
        families: The method's name, and the name of the family: the method with some of its options.
    """
    found: dict[str, tuple[str, str, str]] = {}
    used: dict[str, int] = {}
    for base, family in families:
        if family not in found:
            count = used[base] = used.get(base, -1) + 1
            method = METHODS.get(base, Method)
            sign = _VARIANTS[(count - 1) % len(_VARIANTS)] if count else method.sign
            found[family] = (method.color, sign, _DASHES[count % len(_DASHES)])
    return found
