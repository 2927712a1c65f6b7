"""Node as a kernel: our side and the driver that Node runs.

Reading order:
process  the Node process and what it says
"""
