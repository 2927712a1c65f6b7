"""What containerd cannot keep: teams, hashed keys, templates, and who owns which sandbox.

Reading order:
tables      the tables
migrations  Alembic's environment and versions
database    engine, migration, ownership of the SQLite file
records     the questions the service asks, one transaction each
volume_records  the same for volumes
"""
