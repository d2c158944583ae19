"""Values in the text of a YAML file, replaced where they stand: comments and layout stay."""

import contextlib
import difflib
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, SequenceNode

from ebm import EBMError, did_you_mean
from ebm.params import value


def at(content: Any, key: str) -> Any:
    """What a nested mapping holds at `key`, such as `model.betas.0`; EBMError names the part that
    is not there."""
    for done, part in enumerate(parts := key.split(".")):
        known = content if isinstance(content, dict) else {}
        if isinstance(content, list):
            known = {str(i): item for i, item in enumerate(content)}
        if part not in known:
            raise EBMError(f"{'.'.join(parts[: done + 1])}: no such key{_instead(part, known)}")
        content = known[part]
    return content


def _instead(part: str, known: Mapping[str, Any]) -> str:
    there_are = f"; there are: {', '.join(known)}" if known else ""
    return did_you_mean(part, known) or there_are


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """`text` with YAML in one line in place of the values of some keys, and nothing else changed.

    Raises:
        EBMError: there is no such key, or its value does not stand by itself (it is a block of
            lines, or an anchor shares it).
    """
    expected = value(text)
    spans = {}
    for key, new in changes.items():
        at(expected, key)
        node = _node(text, key)
        if isinstance(node, CollectionNode) and not node.flow_style:
            raise EBMError(f"{key}: a block of several lines; name a key in it")
        spans[node.start_mark.index, node.end_mark.index] = new
        *parents, last = key.split(".")
        holder = at(expected, ".".join(parents)) if parents else expected
        holder[int(last) if isinstance(holder, list) else last] = value(new)
    for (start, end), new in sorted(spans.items(), reverse=True):
        text = text[:start] + new + text[end:]
    with contextlib.suppress(EBMError):  # an alias may have lost its anchor
        if value(text) == expected:
            return text
    raise EBMError(f"{', '.join(changes)}: cannot be changed each by itself")


def _node(text: str, key: str) -> Node:
    """The node of a key that is there, which knows the place of its text."""
    node = YAML(typ="safe", pure=True).compose(text)
    for part in key.split("."):
        if isinstance(node, MappingNode):
            held = next((held for name, held in node.value if name.value == part), None)
            if held is None:
                raise EBMError(f"{key}: comes from elsewhere (<<); write it out to change it here")
            node = held
        elif isinstance(node, SequenceNode):
            node = node.value[int(part)]
    return node


def scalar(number: float) -> str:
    """A number as every reader of YAML takes it for one: those of YAML 1.1 want a point."""
    text = repr(number)
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if mark and "." not in mantissa else text


def diff(old: str, new: str, name: str) -> str:
    """A unified diff of a file in the root, as `git apply` takes it; empty if nothing differs."""
    lines = difflib.unified_diff(
        old.splitlines(True), new.splitlines(True), f"a/{name}", f"b/{name}"
    )
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
        for line in lines
    )
