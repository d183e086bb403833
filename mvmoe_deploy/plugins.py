"""What other installed packages add to this one: targets and architectures, announced as entry points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from mvmoe_deploy.errors import ConfigError, first_line

T = TypeVar("T")


def announced(group: str, kind: type[T]) -> Iterator[T]:
    """Imports what installed packages announce in an entry point group.

    Args:
        group: the group's name, such as ``mvmoe_deploy.targets``.
        kind: the class of what is expected there.

    Raises:
        ConfigError: an entry point cannot be imported, or is of another class.
    """
    from importlib.metadata import entry_points  # takes 15 ms, and what is built in does not need it

    for entry in entry_points(group=group):
        try:
            found = entry.load()
        except Exception as error:
            raise ConfigError(f"entry point {entry.value}: cannot be imported ({first_line(error)})") from None
        if not isinstance(found, kind):
            raise ConfigError(f"entry point {entry.value}: is a {type(found).__name__}, expected {kind.__name__}")
        yield found
