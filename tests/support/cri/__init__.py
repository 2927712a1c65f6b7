"""A client of Kubernetes' container runtime interface, as a kubelet would be one.

stubs    messages and services, compiled from cri.proto when a test first needs them
client   pods, containers and images by gRPC
streams  exec, attach and port-forward over the WebSocket behind the URLs that CRI answers
"""
