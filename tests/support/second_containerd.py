"""A containerd 2.x of its own in the dev VM, beside Debian's: real guests, the same shim.

Root, state and socket lie in /run, so that all of it goes with the VM; the programs are those of
the host's build cache, which the VM sees.
"""

from __future__ import annotations

import json
from pathlib import Path

from containerd_configs import configuration
from containerd_release import Release
from dev_vm import RUNTIME, SMALL, DevVm, Result

from vmcell_tools import dev_containerd
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.oci_image import find_oci_image
from vmcell_tools.progress import Progress

HOME = Path("/run/ctd2")
SOCKET = HOME / "containerd.sock"
CRI_PORT, STREAM_PORT = 10012, 10013
NAMESPACE = "second"
SUBNET = "10.89.0.0/16"


class SecondContainerd:
    """`start` once; the daemon then runs until `stop`, with the small image in `namespaces`."""

    def __init__(self, dev_vm: DevVm, release: Release, nerdctl: Path | None = None) -> None:
        self.dev_vm = dev_vm
        self._release = release
        self._nerdctl = nerdctl

    def start(self, *namespaces: str) -> None:
        text = configuration(HOME, version=3, cri=True, image=SMALL, ports=(CRI_PORT, STREAM_PORT))
        network = json.loads(dev_containerd.files()[dev_containerd.CNI_PATH])
        network["name"] = "second-pods"
        network["plugins"][0]["ipam"]["ranges"] = [[{"subnet": SUBNET}]]
        image = find_oci_image("small", BuildCache.default(), Progress("vm lane", quiet=True))
        assert image is not None
        imports = "; ".join(
            f"{self._words('ctr', '-n', name)} images import --no-unpack {image.archive} >/dev/null"
            for name in namespaces
        )
        daemon = f"{self._release.program('containerd')} --config {HOME}/config.toml"
        script = f"""
            set -e
            mkdir -p {HOME}/cni
            cat >{HOME}/config.toml
            printf '%s' '{json.dumps(network)}' >{HOME}/cni/10-pods.conflist
            setsid {daemon} >/mnt/out/containerd-2.log 2>&1 </dev/null &
            until {self._words("ctr")} version >/dev/null 2>&1; do sleep 0.2; done
            {imports}
        """
        self.dev_vm.check("sh", "-c", script, stdin=text.encode(), timeout_s=180)

    def stop(self) -> None:
        """The daemon's end; what it leaves mounted goes with the VM."""
        self.dev_vm.run("pkill", "-KILL", "-f", f"[-]-config {HOME}/config.toml")

    def _words(self, program: str, *words: str) -> str:
        return " ".join((self._release.program(program), "--address", str(SOCKET), *words))

    def ctr(self, *words: str, stdin: bytes = b"") -> Result:
        command = (self._release.program("ctr"), "--address", str(SOCKET), "-n", NAMESPACE)
        return self.dev_vm.run(*command, *words, stdin=stdin)

    def run(self, name: str, *words: str, flags: tuple[str, ...] = ()) -> Result:
        return self.ctr("run", *flags, "--runtime", RUNTIME, SMALL, name, *words)

    @property
    def nerdctl_words(self) -> tuple[str, ...]:
        """nerdctl with its own data and networks."""
        assert self._nerdctl is not None
        return (
            str(self._nerdctl),
            *("--address", str(SOCKET), "--namespace", NAMESPACE, "--data-root", f"{HOME}/nerdctl"),
            *("--cni-path", dev_containerd.CNI_PLUGINS, "--cni-netconfpath", f"{HOME}/nerdctl-cni"),
        )
