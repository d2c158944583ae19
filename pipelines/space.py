"""What a sweep searches: `--search KEY=VALUES`, where KEY is one of an experiment's parameters.

    model.learning_rate=1e-4..1e-1:log    a range of numbers, uniform in the logarithm
    model.hidden=50..400                  whole numbers, as the present value is one
    model.k=1,5,10                        a choice; of anything that YAML writes in one line
    train.steps=500                       a choice of one

Numbers of a range are searched to four significant digits, so what is tried, told and written into
`params.yaml` is the same short number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import ebm.params
from ebm import EBMError
from pipelines import patch

FIXED = ("dataset", "variant")
"""What makes an experiment another one, whose data would have to be prepared."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; whole ones if both are."""

    key: str
    low: float
    high: float
    log: bool

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int)

    @property
    def extremes(self) -> tuple[str, ...]:
        return patch.scalar(self.low), patch.scalar(self.high)

    def text(self, number: float) -> str:
        """A number of the range as it is tried and written."""
        if self.whole:
            return str(number)
        return patch.scalar(min(max(float(f"{number:.4g}"), self.low), self.high))

    def __str__(self) -> str:
        return "..".join(self.extremes) + ":log" * self.log


@dataclass(frozen=True)
class Choice:
    """One of some values, each a YAML text."""

    key: str
    options: tuple[str, ...]

    @property
    def extremes(self) -> tuple[str, ...]:
        return self.options

    def __str__(self) -> str:
        return ",".join(self.options)


Space = tuple[Range | Choice, ...]


def parse(arguments: Sequence[str], params: str, experiment: str) -> Space:
    """The space that command-line arguments span, which the schema accepts at its extremes.

    Args:
        arguments: `KEY=VALUES`, at least one.
        params: the text of `params.yaml`, which is valid.
        experiment: a name in it.

    Raises:
        EBMError: one line, for anything that is not right.
    """
    known = patch.value(params)["experiments"][experiment]
    space: dict[str, Range | Choice] = {}
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if not (equals and values):
            raise EBMError(
                f"--search {argument}: expected KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=A,B,C"
            )
        if key in FIXED:
            raise EBMError(f"--search {key}: another {key} is another experiment")
        if key in space:
            raise EBMError(f"--search {key}: given twice")
        try:
            space[key] = _dimension(key, values, patch.at(known, key))
        except EBMError as error:
            raise EBMError(f"--search {error}") from None
    if not space:
        raise EBMError("--search: nothing to search")
    for dimension in space.values():
        for text in dimension.extremes:
            ebm.params.parse(patched(params, experiment, {dimension.key: text}))
    try:  # one key may lie in another
        patched(params, experiment, {d.key: d.extremes[0] for d in space.values()})
    except EBMError as error:
        raise EBMError(f"--search {error}") from None
    return tuple(space.values())


def patched(params: str, experiment: str, texts: Mapping[str, str]) -> str:
    """The text of `params.yaml` with other values of an experiment."""
    changes = {f"experiments.{experiment}.{key}": text for key, text in texts.items()}
    return patch.replaced(params, changes)


def _dimension(key: str, values: str, present: object) -> Range | Choice:
    if ".." not in values:
        return Choice(key, _options(key, values))
    ends, colon, scale = values.partition(":")
    low, high = (_number(key, end) for end in ends.split("..", 1))
    if colon and scale != "log":
        raise EBMError(f"{key}={values}: after the colon only 'log' may stand")
    if low >= high:
        raise EBMError(f"{key}={values}: {low:g} is not below {high:g}")
    if colon and low <= 0:
        raise EBMError(f"{key}={values}: a logarithm needs a lower end above 0")
    if isinstance(present, float) or not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    return Range(key, low, high, bool(colon))


def _number(key: str, text: str) -> float:
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        raise EBMError(f"{key}: {text!r} is not a number")
    return float(text)


def _options(key: str, values: str) -> tuple[str, ...]:
    """The texts of the items of a YAML list without its brackets."""
    text = f"[{values}]"
    try:
        items = YAML(typ="safe", pure=True).compose(text).value
    except YAMLError as error:
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise EBMError(f"{key}={values}: not values of YAML: {problem}") from None
    options = tuple(text[item.start_mark.index : item.end_mark.index].strip() for item in items)
    if len(set(options)) < len(options):
        raise EBMError(f"{key}={values}: a value is given twice")
    return options
