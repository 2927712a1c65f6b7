"""Immutable descriptions: what typing.NamedTuple would be, without its price at boot.

Importing typing and making the classes (each is source text, compiled at import) was a fifth of the
time in which PID 1 gets ready. A Record's fields are its annotations, in order; a value assigned to
one in the class is its default. Type checkers see a frozen dataclass.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, dataclass_transform
else:

    def dataclass_transform(**_: object) -> object:
        return lambda cls: cls


@dataclass_transform(frozen_default=True)
class Record:
    """Base of the descriptions; a field that is not given and has no default is a TypeError."""

    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.fields = tuple(cls.__annotations__)

    def __init__(self, *values: Any, **named: Any) -> None:
        cls = type(self)
        given = dict(zip(cls.fields, values, strict=False), **named)
        known = [name for name in cls.fields if name in given or hasattr(cls, name)]
        if len(known) != len(cls.fields) or len(values) + len(named) > len(given.keys() & known):
            raise TypeError(f"{cls.__name__} has the fields {', '.join(cls.fields)}")
        self.__dict__.update(given)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields instead."""
        return type(self)(**{name: getattr(self, name) for name in self.fields} | changes)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(
            getattr(self, name) == getattr(other, name) for name in self.fields
        )

    __hash__ = None  # type: ignore[assignment]  # fields may be lists and maps

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.fields)
        return f"{type(self).__name__}({inner})"
