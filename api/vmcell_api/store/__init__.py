"""What containerd cannot keep: teams, hashed keys, templates, and who owns which sandbox.

Reading order:
tables           the tables
template_tables  the tables of teams' templates
migrations       Alembic's environment and versions
database         engine, migration, ownership of the SQLite file
records          the questions the service asks, one transaction each
create_keys      idempotency keys of creates
templates        the same for teams' templates, builds, tags and upload links
teams            tenants and their limits, for the operator
api_keys         keys: whose they are, what they may do, until when
audit            what was done, kept within bounds
volume_records   the same for volumes
snapshot_rows    the same for snapshots
"""
