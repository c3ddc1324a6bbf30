"""One word for one thing. Records and scripts of older versions have other words for some; this is the table of them.

A cell's key holds the name that its experiment had when it was first recorded, so that name stays in records.
"""

RECORDED = {"heads": "attention", "seeds": "variance", "speed": "generation", "theory": "validate"}
"""What records call an experiment, by its word, where they have another one."""
COMMANDS = {"evaluate": "heads", "variance": "seeds", "generate-bench": "speed", "validate": "theory"}
"""Commands by the names that they had before; `evaluate` is what the methodology calls `heads`."""


def recorded(word: str) -> str:
    """Return what records call an experiment, by its word or by that very name."""
    return RECORDED.get(word, word)


def word(recorded: str) -> str:
    """Return today's word for an experiment, by its name in records."""
    return next((word for word, name in RECORDED.items() if name == recorded), recorded)
