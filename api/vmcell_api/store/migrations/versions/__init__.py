"""The migrations, oldest first; each names the one before it.

Reading order:
v0001_first_tables  teams, api_keys, templates, sandboxes
v0004_traffic_token  sandboxes whose ports are closed
v0006_create_keys  idempotency keys of creates
"""
