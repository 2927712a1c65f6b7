"""C structs from annotated classes: one declaration gives the layout and the type checker's view.

    @c_struct(16)
    class kvm_msr_entry(ctypes.Structure):
        index: u32
        reserved: u32
        data: u64

The number is the struct's size in bytes; a layout that comes out different is an error at import.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

u8 = Annotated[int, ctypes.c_uint8]
u16 = Annotated[int, ctypes.c_uint16]
u32 = Annotated[int, ctypes.c_uint32]
s32 = Annotated[int, ctypes.c_int32]
u64 = Annotated[int, ctypes.c_uint64]

_Aggregate = TypeVar("_Aggregate", bound="type[ctypes.Structure] | type[ctypes.Union]")


def c_struct(size_bytes: int) -> Callable[[_Aggregate], _Aggregate]:
    """Fills `_fields_` from the class's annotations, in order."""

    def fill(aggregate: _Aggregate) -> _Aggregate:
        hints = get_type_hints(aggregate, include_extras=True)
        names = [name for name in aggregate.__annotations__ if not name.startswith("_")]
        aggregate._fields_ = [(name, _c_type(hints[name])) for name in names]
        if ctypes.sizeof(aggregate) != size_bytes:
            raise TypeError(
                f"{aggregate.__name__} has {ctypes.sizeof(aggregate)} bytes, declared {size_bytes}"
            )
        return aggregate

    return fill


def offset_of(aggregate: type[ctypes.Structure], field: str) -> int:
    """C's offsetof for a field of an annotated class."""
    offset: int = getattr(aggregate, field).offset
    return offset


def _c_type(hint: Any) -> Any:
    metadata = getattr(hint, "__metadata__", None)
    return metadata[0] if metadata else hint
