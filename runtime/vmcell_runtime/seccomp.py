"""A seccomp filter as the program the kernel runs: rules in, bytes out; nothing is called here.

A rule is a system call, what becomes of it, and, if its arguments count, which words of them. Only
the low 32 bits of an argument can be looked at: each place that does says why the kernel looks at
no more. What no rule names gets the last action; another architecture's calls, x32's among them,
end the process.

The rules are tried one after the other, so those that come first cost least. (The kernel skips the
program for calls that are allowed whatever their arguments: seccomp_cache_prepare of Linux 5.11.)
Sources: seccomp(2), <linux/filter.h>, <linux/seccomp.h>, Documentation/networking/filter.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# What becomes of a call; <linux/seccomp.h>
KILL_PROCESS = 0x80000000
TRAP = 0x00030000
ALLOW = 0x7FFF0000
_ERRNO = 0x00050000

# Of struct seccomp_data, little-endian
_NUMBER_OFFSET = 0
_ARCH_OFFSET = 4
_ARGUMENTS_OFFSET = 16

AUDIT_ARCH_X86_64 = 0xC000003E
X32_BIT = 0x40000000  # __X32_SYSCALL_BIT

# Instructions; <linux/bpf_common.h>
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter: code, jt, jf, k
INSTRUCTION_BYTES = _INSTRUCTION.size
_MAX_JUMP = 255
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS


def errno_action(code: int) -> int:
    """The call is not made and fails with `code`."""
    if not 0 < code < 4096:
        raise ValueError(f"{code} is no errno")
    return _ERRNO | code


class Word(NamedTuple):
    """One argument's low 32 bits: `word & mask` is one of `values`."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


class Rule(NamedTuple):
    """Call `number` gets `action` where all of `words` are as they say; else the next rule."""

    number: int
    action: int = ALLOW
    words: tuple[Word, ...] = ()


def encode_rules(rules: Iterable[Rule]) -> bytes:
    """Instructions that leave the filter where a rule fits, and end behind themselves where none
    does. With the call's number loaded, as `HEAD` leaves it, and at their end again."""
    return b"".join(map(_encode_rule, rules))


def _encode_rule(rule: Rule) -> bytes:
    """number? no: out. Each word: load, mask, one of the values? no: reload, out. Yes: action."""
    if not 0 <= rule.number < X32_BIT:
        raise ValueError(f"{rule.number} is no system call of x86-64")
    if not rule.words:
        return _jump(_JUMP_EQUAL, rule.number, 0, 1) + _return(rule.action)
    tail = _return(rule.action) + _load(_NUMBER_OFFSET)
    body = b""
    for word in reversed(rule.words):
        # Where this word does not fit: over the rest and the return, to the reload.
        body = _encode_word(word, len(body) // INSTRUCTION_BYTES + 1) + body
    body += tail
    return _jump(_JUMP_EQUAL, rule.number, 0, len(body) // INSTRUCTION_BYTES) + body


def _encode_word(word: Word, to_reload: int) -> bytes:
    if not 0 <= word.argument < 6 or not word.values:
        raise ValueError(f"a rule on argument {word.argument} with values {word.values}")
    code = [_load(_ARGUMENTS_OFFSET + 8 * word.argument)]
    if word.mask != 0xFFFFFFFF:
        code.append(_INSTRUCTION.pack(_AND, 0, 0, word.mask))
    left = len(word.values)
    for value in word.values:
        left -= 1
        code.append(_jump(_JUMP_EQUAL, value, left, 0 if left else to_reload))
    return b"".join(code)


def _load(offset: int) -> bytes:
    return _INSTRUCTION.pack(_LOAD, 0, 0, offset)


def _return(action: int) -> bytes:
    return _INSTRUCTION.pack(_RETURN, 0, 0, action)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    if max(if_true, if_false) > _MAX_JUMP:
        raise ValueError(f"a rule of {max(if_true, if_false)} instructions; split it in two")
    return _INSTRUCTION.pack(code, if_true, if_false, value)


HEAD = (
    _load(_ARCH_OFFSET)
    + _jump(_JUMP_EQUAL, AUDIT_ARCH_X86_64, 1, 0)
    + _return(KILL_PROCESS)
    + _load(_NUMBER_OFFSET)
    + _jump(_JUMP_AT_LEAST, X32_BIT, 0, 1)
    + _return(KILL_PROCESS)
)


def encode_filter(parts: Sequence[bytes], last: int) -> bytes:
    """The whole program: `HEAD`, what `encode_rules` made, and the action for all the rest."""
    program = HEAD + b"".join(parts) + _return(last)
    if len(program) > MAX_INSTRUCTIONS * INSTRUCTION_BYTES:
        raise ValueError(
            f"a filter of {len(program) // INSTRUCTION_BYTES} instructions; at most 4096"
        )
    return program
