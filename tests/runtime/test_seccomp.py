"""Filters of system calls: what the program says is what the rules say."""

from __future__ import annotations

import errno
import subprocess
import sys

import bpf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_runtime.seccomp import (
    ALLOW,
    KILL_PROCESS,
    TRAP,
    Rule,
    Word,
    encode_filter,
    encode_rules,
    errno_action,
)

ACTIONS = st.sampled_from((ALLOW, TRAP, KILL_PROCESS, errno_action(errno.EPERM)))
# Few of each, so that rules and calls meet.
NUMBERS = st.integers(0, 5)
VALUES = st.integers(0, 7) | st.sampled_from((0x5401, 0xAE80, 0xFFFFFFFF))
WORDS = st.builds(
    Word,
    st.integers(0, 5),
    st.lists(VALUES, min_size=1, max_size=6).map(tuple),
    st.sampled_from((0xFFFFFFFF, 4, 3)),
)
RULES = st.builds(Rule, NUMBERS, ACTIONS, st.lists(WORDS, max_size=3).map(tuple))
ARGUMENTS = st.lists(
    st.integers(0, 7) | st.integers(0, 2**64 - 1) | VALUES.map(lambda value: value | 1 << 40),
    min_size=6,
    max_size=6,
)


def expected(rules: list[Rule], number: int, arguments: list[int], last: int) -> int:
    """The same, said without a program."""
    for rule in rules:
        if rule.number == number and all(
            arguments[word.argument] & 0xFFFFFFFF & word.mask in word.values for word in rule.words
        ):
            return rule.action
    return last


@given(st.lists(RULES, max_size=12), NUMBERS, ARGUMENTS, ACTIONS)
def test_a_program_decides_as_its_rules(
    rules: list[Rule], number: int, arguments: list[int], last: int
) -> None:
    half = len(rules) // 2
    program = encode_filter((encode_rules(rules[:half]), encode_rules(rules[half:])), last)
    verdict = bpf.run(program, bpf.call(number, *arguments))
    assert verdict.action == expected(rules, number, arguments, last)


@given(NUMBERS, ARGUMENTS, st.integers(0, 2**32 - 1))
def test_another_architectures_calls_end_the_process(
    number: int, arguments: list[int], arch: int
) -> None:
    program = encode_filter((encode_rules([Rule(n) for n in range(6)]),), ALLOW)
    verdict = bpf.run(program, bpf.call(number, *arguments, arch=arch))
    assert verdict.action == (ALLOW if arch == 0xC000003E else KILL_PROCESS)


@pytest.mark.parametrize("number", [0x40000000, 0x40000001, 0x40000200, 0x7FFFFFFF, -1, 2**31])
def test_x32_and_no_numbers_at_all_end_the_process(number: int) -> None:
    program = encode_filter((encode_rules([Rule(0), Rule(1)]),), ALLOW)
    assert bpf.run(program, bpf.call(number)).action == KILL_PROCESS


def test_a_list_of_values_may_be_long_but_not_endless() -> None:
    values = tuple(range(250))
    program = encode_filter((encode_rules([Rule(16, ALLOW, (Word(1, values),))]),), TRAP)
    for value in (0, 1, 128, 249):
        assert bpf.run(program, bpf.call(16, 9, value)).action == ALLOW
    assert bpf.run(program, bpf.call(16, 9, 250)).action == TRAP
    with pytest.raises(ValueError, match="split it"):
        encode_rules([Rule(16, ALLOW, (Word(1, tuple(range(300))),))])


@pytest.mark.parametrize(
    "rule",
    [
        Rule(-1),
        Rule(0x40000000),
        Rule(1, ALLOW, (Word(6, (1,)),)),
        Rule(1, ALLOW, (Word(-1, (1,)),)),
        Rule(1, ALLOW, (Word(0, ()),)),
    ],
)
def test_a_rule_without_sense_is_refused(rule: Rule) -> None:
    with pytest.raises(ValueError, match=r"no system call|a rule on argument"):
        encode_rules([rule])


def test_no_errno_is_no_action() -> None:
    assert errno_action(errno.EPERM) == 0x00050001
    for code in (0, -1, 4096):
        with pytest.raises(ValueError, match="no errno"):
            errno_action(code)


def test_a_program_longer_than_the_kernel_takes_is_refused() -> None:
    rules = encode_rules([Rule(number) for number in range(2048)])
    with pytest.raises(ValueError, match="at most 4096"):
        encode_filter((rules,), TRAP)


def test_the_kernel_takes_it_and_does_as_the_interpreter() -> None:
    """In a child: one call refused, one refused for its argument's low word, one made."""
    source = f"""
import ctypes, os, sys
sys.path[:0] = {sys.path!r}
from vmcell_runtime.seccomp import *
libc = ctypes.CDLL(None, use_errno=True)
class Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))
rules = [Rule(39, errno_action(7)), Rule(102, errno_action(8), (Word(0, (5,)),))]
program = encode_filter((encode_rules(rules),), ALLOW)
assert not libc.prctl(38, 1, 0, 0, 0)
assert not libc.syscall(317, 1, 0, ctypes.byref(Program(len(program) // 8, program)))
said = []
for number, argument in ((39, 0), (102, 5), (102, 1 << 32 | 5), (102, 4)):
    result = libc.syscall(number, ctypes.c_ulong(argument))
    said.append(ctypes.get_errno() if result < 0 else 0)
print(said)
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[7, 8, 8, 0]\n", "", 0)
