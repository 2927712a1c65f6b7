"""Traffic control over rtnetlink: all that comes in at one interface goes out at another.

A filter on the ingress queueing discipline takes every frame before the stack of the namespace sees
it. u32 with a key that matches anything stands in for matchall, which not every kernel has.
Source: tc-mirred(8), tc-u32(8), <linux/pkt_sched.h>, <linux/pkt_cls.h>, <linux/tc_act/tc_mirred.h>.
"""

from __future__ import annotations

from struct import Struct

from vmcell_protos import rtnetlink as nl

RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER = 36, 37, 44
TCA_KIND, TCA_OPTIONS = 1, 2
TC_H_INGRESS = 0xFFFF_FFF1
INGRESS_HANDLE = 0xFFFF_0000
ETH_P_ALL = 3
TCA_U32_SEL, TCA_U32_ACT, TC_U32_TERMINAL = 5, 7, 1
TCA_ACT_KIND, TCA_ACT_OPTIONS = 1, 2
TCA_MIRRED_PARMS, TCA_EGRESS_REDIR, TC_ACT_STOLEN = 2, 1, 4

TCMSG = Struct("=BxxxiIII")  # family, interface, handle, parent, info
# The masks of these two are in network order; all of ours are zero.
TC_U32_SEL = Struct("=BBBxHHhhI")  # flags, offset shift, keys, mask, off, offoff, hoff, hash mask
TC_U32_KEY = Struct("=IIii")  # mask, value, offset, offset mask
TC_MIRRED = Struct("=IIiiiiI")  # index, capab, action, refcnt, bindcnt, eaction, interface

_PRIORITY = 1


def add_ingress(index: int) -> bytes:
    """RTM_NEWQDISC: the interface gets its ingress hook; EEXIST when it has one."""
    body = TCMSG.pack(0, index, INGRESS_HANDLE, TC_H_INGRESS, 0)
    body += nl.attribute(TCA_KIND, b"ingress\0")
    return nl.message(RTM_NEWQDISC, nl.NLM_F_CREATE | nl.NLM_F_EXCL, body)


def delete_ingress(index: int) -> bytes:
    """RTM_DELQDISC: the ingress hook goes, with its filters; ENOENT or EINVAL when it has none."""
    return nl.message(RTM_DELQDISC, 0, TCMSG.pack(0, index, INGRESS_HANDLE, TC_H_INGRESS, 0))


def redirect(source: int, target: int) -> bytes:
    """RTM_NEWTFILTER: what comes in at interface `source` is sent by interface `target`."""
    # Protocol in the low half, in network order; priority in the high half.
    info = _PRIORITY << 16 | ETH_P_ALL << 8
    mirred = TC_MIRRED.pack(0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, target)
    action = nl.attribute(TCA_ACT_KIND, b"mirred\0") + nl.attribute(
        TCA_ACT_OPTIONS, nl.attribute(TCA_MIRRED_PARMS, mirred)
    )
    selector = TC_U32_SEL.pack(TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + TC_U32_KEY.pack(0, 0, 0, 0)
    options = nl.attribute(TCA_U32_SEL, selector) + nl.attribute(
        TCA_U32_ACT, nl.attribute(1, action)
    )
    body = TCMSG.pack(0, source, 0, INGRESS_HANDLE, info)
    body += nl.attribute(TCA_KIND, b"u32\0") + nl.attribute(TCA_OPTIONS, options)
    return nl.message(RTM_NEWTFILTER, nl.NLM_F_CREATE | nl.NLM_F_EXCL, body)
