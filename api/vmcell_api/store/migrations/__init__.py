"""Alembic's environment of the store.

Reading order:
versions  the migrations, oldest first
env       what Alembic runs to apply them
"""
