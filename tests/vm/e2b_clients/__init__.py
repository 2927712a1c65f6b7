"""The unmodified clients on the host against one service in the dev VM."""
