"""Owns label selectors as people write them: `zone=a,disk in (ssd,nvme),!old`."""

from __future__ import annotations

import re
from typing import Final

from nodeproxy.operator.api import MatchExpression, Selector

_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?"
_VALUE: Final = r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)?"
_EQUAL: Final = re.compile(rf"({_NAME})\s*(=|==|!=)\s*({_VALUE})")
_SET: Final = re.compile(rf"({_NAME})\s+(in|notin)\s+\(([^()]*)\)")
_EXISTS: Final = re.compile(rf"(!?)\s*({_NAME})")


def parse_selector(text: str) -> Selector:
    """A selector as `kubectl --selector` takes it. Raises ValueError, naming the part that is none."""
    labels: dict[str, str] = {}
    expressions: list[MatchExpression] = []
    for part in (one.strip() for one in re.split(r",(?![^()]*\))", text)):
        if found := _EQUAL.fullmatch(part):
            key, sign, value = found.groups()
            if sign == "!=":
                expressions.append(MatchExpression(key=key, operator="NotIn", values=(value,)))
            elif labels.setdefault(key, value) != value:
                raise ValueError(f"{key} cannot be {labels[key]} and {value}")
        elif found := _SET.fullmatch(part):
            values = tuple(one.strip() for one in found[3].split(","))
            if not all(re.fullmatch(_VALUE, value) for value in values) or values == ("",):
                raise ValueError(f"{part!r}: values are missing or not valid")
            expressions.append(MatchExpression(key=found[1], operator="In" if found[2] == "in" else "NotIn", values=values))
        elif found := _EXISTS.fullmatch(part):
            expressions.append(MatchExpression(key=found[2], operator="DoesNotExist" if found[1] else "Exists"))
        else:
            raise ValueError(
                f"{part!r} is not a requirement on a label, as key=value, key!=value, key in (a,b), key or !key"
            )
    return Selector(match_labels=labels, match_expressions=tuple(expressions))
