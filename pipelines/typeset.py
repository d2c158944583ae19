"""Numbers, durations and pages as a reader wants them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

TEMPLATES = Path(__file__).parent / "templates"


def template(name: str, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """A page without its content; what is filled in is escaped, and `filters` set it."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "measured": measured,
        "duration": duration,
        **filters,
    }
    return environment.get_template(name)


def measured(value: float) -> str:
    """Four significant digits, the last ones even if they are zeros."""
    return number(value, "#.4g").rstrip(".")


def number(value: float, form: str = ".4g") -> str:
    """A number as a reader wants it: a real minus sign, powers of ten, thin spaces."""
    if not math.isfinite(value):
        return "undefined"
    if value == 0:
        text = "0"
    elif 9999.5 <= abs(value) < 1e9:
        text = f"{round(value):,}".replace(",", "\u2009")
    elif isinstance(value, int) and abs(value) < 1e9:
        text = str(value)
    elif 1e-3 <= abs(value) < 1e9:
        text = f"{value:{form}}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa} × 10{_superscript(int(exponent))}"
    return text.replace("-", "−")


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
