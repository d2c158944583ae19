"""Energy-based models: energies, objectives, samplers, training and metrics in plain PyTorch."""

import difflib
from collections.abc import Iterable


class EBMError(Exception):
    """What went wrong, in one line that a user can act on. Commands print it without a
    traceback."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """How such a line about an unknown `word` goes on: with the nearest of those that are `known`,
    or not at all."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
