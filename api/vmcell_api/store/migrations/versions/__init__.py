"""The migrations, oldest first; each names the one before it.

Reading order:
v0001_first_tables      teams, api_keys, templates, sandboxes
v0006_code_interpreter  the template of the code interpreter
"""
