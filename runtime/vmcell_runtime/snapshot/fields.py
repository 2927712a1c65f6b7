"""Typed reads from a JSON tree that somebody else wrote; each error names the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vmcell_protos.errors import CallerError

T = TypeVar("T")

Tree = dict[str, object]


def damaged(what: str) -> CallerError:
    """The error for a state that no machine of ours has written."""
    return CallerError(f"the saved machine is damaged: {what}", code="data_loss")


def take_tree(tree: object, name: str) -> Tree:
    if not isinstance(tree, dict):
        raise damaged(f"{name} is no object")
    return tree


def take_int(tree: Tree, name: str, limit: int) -> int:
    """A number from 0 to below `limit`."""
    value = tree.get(name)
    if type(value) is not int or not 0 <= value < limit:
        raise damaged(f"{name} is {str(value)[:40]!r}, not a number below {limit:#x}")
    return value


def take_bool(tree: Tree, name: str) -> bool:
    value = tree.get(name)
    if not isinstance(value, bool):
        raise damaged(f"{name} is {str(value)[:40]!r}, not true or false")
    return value


def take_bytes(tree: Tree, name: str, shortest: int, longest: int) -> bytes:
    """Bytes in hex, of `shortest` to `longest` bytes."""
    value = tree.get(name)
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or not shortest <= len(found) <= longest:
        raise damaged(f"{name} is not {shortest} to {longest} bytes in hex")
    return found


def take_rows(tree: Tree, name: str, longest: int, make: Callable[[object], T]) -> tuple[T, ...]:
    """A list of at most `longest`, each made by `make`."""
    value = tree.get(name)
    if not isinstance(value, list) or len(value) > longest:
        raise damaged(f"{name} is no list of at most {longest}")
    return tuple(make(row) for row in value)


def take_numbers(tree: Tree, name: str, most: int) -> dict[str, int]:
    """At most `most` numbers by name, each from -1 to below 2**64."""
    value = tree.get(name)
    if not isinstance(value, dict) or len(value) > most:
        raise damaged(f"{name} is no object of at most {most} numbers")
    for number in value.values():
        if type(number) is not int or not -1 <= number < 1 << 64:
            raise damaged(f"{name} has {str(number)[:40]!r} where a number should be")
    return dict(value)


def take_pairs(tree: Tree, name: str, most: int) -> dict[int, int]:
    """[number below 2**32, number below 2**64] rows as a mapping."""

    def pair(row: object) -> tuple[int, int]:
        if not isinstance(row, list) or len(row) != 2:
            raise damaged(f"{name} has a row that is no pair")
        key, value = row
        if type(key) is not int or type(value) is not int:
            raise damaged(f"{name} has a pair that is not of numbers")
        if not 0 <= key < 1 << 32 or not 0 <= value < 1 << 64:
            raise damaged(f"{name} has a pair that is out of range")
        return key, value

    return dict(take_rows(tree, name, most, pair))
