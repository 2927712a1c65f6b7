"""The migrations, oldest first; each names the one before it.

Reading order:
v0001_first_tables      teams, api_keys, templates, sandboxes
v0002_keys_and_audit    ids, scopes and ends of keys, limits of teams, audit
v0003_templates         templates of teams, builds, tags, links for uploads
v0004_traffic_token     sandboxes whose ports are closed
v0005_volumes           volumes
v0006_create_keys       idempotency keys of creates
v0007_code_interpreter  the template of the code interpreter
v0008_snapshots         snapshots
v0009_desktop           the template of the desktop
"""
