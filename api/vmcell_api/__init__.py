"""The E2B control plane and the node daemon behind it.

Reading order:
config       the service's settings
identifiers  sandbox ids, API keys, tokens
node         noded: sandboxes through containerd
"""
