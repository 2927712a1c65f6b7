"""KVM: what <linux/kvm.h> declares, one checked ioctl, and the owners of its descriptors.

Reading order:
layouts           the decorator that turns annotations into C structs
abi               request numbers, structs and constants of the kernel; nothing is called there
ioctl             the one ioctl of this package, which refuses buffers the kernel would overrun
host_kind         what this host's /dev/kvm can do, and the sentence that says why not
cpuid             the CPUID a guest sees, per vCPU
cpuid_difference  what a processor lacks of another's
system            /dev/kvm: capabilities and the CPUID it can give
vm                one VM: memory slots, irqchip, irqfd, ioeventfd
vcpu              one vCPU: registers, the run page and KVM_RUN
vcpu_state        all of a vCPU, taken out and put back
"""
