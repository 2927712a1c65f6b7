"""The order in which a vCPU is taken out of KVM and put back."""

from __future__ import annotations

from typing import cast

import pytest

from vmcell_protos.errors import CallerError
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.vcpu import Vcpu
from vmcell_runtime.kvm.vcpu_state import load_vcpu, save_vcpu

MSRS = [abi.MSR_IA32_TSC_DEADLINE, abi.MSR_IA32_TSC, 0x4B564D01]


class RecordingVcpu:
    """Whose deadline timer runs out at the request number `timer`."""

    def __init__(self, timer: int = -1) -> None:
        self.asked: list[object] = []
        self.timer = timer

    def _ask(self, what: object) -> bool:
        self.asked.append(what)
        return 0 <= self.timer < len(self.asked)

    def mp_state(self) -> int:
        self._ask("mp_state")
        return 0

    def set_mp_state(self, _: int) -> None:
        self._ask("mp_state")

    def get_opaque(self, request: int, length_bytes: int) -> bytes:
        over = self._ask(request)
        return bytes([over]).ljust(length_bytes, b"\0")

    def set_opaque(self, request: int, _: bytes) -> None:
        self._ask(request)

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        over = self._ask("msrs")
        return {i: 0 if over and i == abi.MSR_IA32_TSC_DEADLINE else 7 for i in indices}

    def set_msrs(self, msrs: dict[int, int]) -> None:
        self.asked += list(msrs)


def test_a_deadline_is_never_lost() -> None:
    """Whenever the timer runs out: it is armed still or its interrupt is pending."""
    for timer in range(12):
        vcpu = RecordingVcpu(timer)
        state = save_vcpu(cast(Vcpu, vcpu), MSRS, abi.XSAVE_BYTES)
        assert state.msrs[abi.MSR_IA32_TSC_DEADLINE] or state.lapic[0], timer
        assert vcpu.asked[0] == "mp_state"
        assert vcpu.asked[-1] == abi.KVM_GET_VCPU_EVENTS


def test_what_others_depend_on_is_put_back_first() -> None:
    state = save_vcpu(cast(Vcpu, RecordingVcpu()), MSRS, abi.XSAVE_BYTES)
    vcpu = RecordingVcpu()
    load_vcpu(cast(Vcpu, vcpu), state, abi.XSAVE_BYTES)
    places = [
        vcpu.asked.index(what)
        for what in (
            abi.KVM_SET_SREGS,
            abi.KVM_SET_LAPIC,
            abi.MSR_IA32_TSC,
            abi.MSR_IA32_TSC_DEADLINE,
            abi.KVM_SET_VCPU_EVENTS,
        )
    ]
    assert places == sorted(places)
    assert vcpu.asked[-1] == abi.KVM_SET_VCPU_EVENTS


def test_more_extended_state_than_there_is_room_for_is_refused() -> None:
    state = save_vcpu(cast(Vcpu, RecordingVcpu()), MSRS, 8192)
    vcpu = RecordingVcpu()
    with pytest.raises(CallerError, match="8192 bytes of processor state") as caught:
        load_vcpu(cast(Vcpu, vcpu), state, abi.XSAVE_BYTES)
    assert caught.value.code == "failed_precondition"
    assert vcpu.asked == []


@pytest.mark.parametrize("host_bytes", [abi.XSAVE_BYTES, 2696 + 8192, 11008])
def test_extended_state_has_room_for_all_the_kernel_touches(host_bytes: int) -> None:
    """KVM copies what KVM_CAP_XSAVE2 says, both ways, whatever the request says (MS2)."""
    touched: list[tuple[int, int]] = []

    class Measuring(RecordingVcpu):
        def get_opaque(self, request: int, length_bytes: int) -> bytes:
            touched.append((request, length_bytes))
            return bytes(length_bytes)

        def set_opaque(self, request: int, content: bytes) -> None:
            touched.append((request, len(content)))

    state = save_vcpu(cast(Vcpu, Measuring()), MSRS, host_bytes)
    # One saved where the state is smaller goes into a host where it is larger.
    load_vcpu(cast(Vcpu, Measuring()), state._replace(xsave=state.xsave[:4096]), host_bytes)
    requests = {abi.KVM_GET_XSAVE, abi.KVM_GET_XSAVE2, abi.KVM_SET_XSAVE}
    assert [size for request, size in touched if request in requests] == [host_bytes] * 2
