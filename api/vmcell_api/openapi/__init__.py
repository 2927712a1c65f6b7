"""The API's own description (OpenAPI 3.1): one table of operations, one module per resource.

A new route gets an `Operation` in its resource's module; a new resource gets a module with `TAG`,
`OPERATIONS` and `SCHEMAS`, and a place in `document.RESOURCES`. Then docs/openapi.json is written
anew by `python -m vmcell_tools.openapi_file`. Tests compare the table with the application's
routes, both ways, and with every call of the E2B SDK's own client.

Reading order:
operation  one operation, and words for JSON schemas
service    health, this document, metrics, the CLI's teams
sandboxes  E2B's sandbox routes
snapshots  what needs snapshots
activity   metrics and logs of a sandbox
templates  templates, names and tags
builds     builds of templates, and uploads for them
volumes    E2B's volumes
secrets    E2B's secrets: refused
operators  teams, keys and audit, for the scope admin
document   all of it as one OpenAPI document
"""
