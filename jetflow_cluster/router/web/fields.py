"""Fields of a JSON body: each is read once with the type that it must have, and what nobody read is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jetflow_cluster.types import InvalidRequestError

_KINDS = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Fields:
    """The members of one JSON object. A member that is null counts as left out.

    Args:
        values: the object.
        prefix: of names in errors, as ``stream_options.``.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._prefix = prefix
        self._known: set[str] = set()
        #: What is wrong with the members that were read.
        self.problems: list[InvalidRequestError] = []

    def take(self, name: str, *kinds: type, default: Any = None) -> Any:
        """A member, or the default when it is left out or of another type, which is then a problem."""
        self._known.add(name)
        value = self._values.get(name)
        if value is None:
            return default
        # An integer is a number too, and a bool is nothing but a bool.
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            self.refuse(name, value, f"must be {' or '.join(_KINDS[kind] for kind in kinds)}")
            return default
        return value

    def take_list(self, name: str, kind: type) -> list[Any]:
        """A list whose members all have one type; empty when it is left out."""
        values = self.take(name, list, default=[])
        for index, value in enumerate(values):
            if type(value) is not kind:
                self.refuse(f"{name}[{index}]", value, f"must be {_KINDS[kind]}")
                return []
        return list(values)

    def take_object(self, name: str) -> Fields:
        """An object; its problems are to be added with `adopt`."""
        return Fields(self.take(name, dict, default={}), f"{self._prefix}{name}.")

    def adopt(self, other: Fields) -> None:
        """Takes over the problems of an inner object, what nobody read included."""
        self.problems += [*other.problems, *other.unknown()]

    def only(self, allowed: Mapping[str, Iterable[Any]]) -> None:
        """Reads members of which only some values can be honoured; the first of each list stands for leaving it out."""
        for name, values in allowed.items():
            self._known.add(name)
            value = self._values.get(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in values):
                self.refuse(name, value, f"is not supported beyond {' or '.join(map(repr, values))}")

    def ignore(self, *names: str) -> None:
        """Members that say something about the request and could not change its answer."""
        self._known.update(names)

    def refuse(self, name: str, value: Any, limit: str) -> None:
        """Adds a problem."""
        self.problems.append(InvalidRequestError(self._prefix + name, value, limit))

    def unknown(self) -> list[InvalidRequestError]:
        """A problem for each member that nobody read."""
        found = []
        for name in self._values.keys() - self._known:
            near = difflib.get_close_matches(name, self._known, n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            found.append(InvalidRequestError(self._prefix + name, self._values[name], f"is not a known field{hint}"))
        return sorted(found, key=lambda problem: problem.field)
