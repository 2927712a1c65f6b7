"""The E2B control plane, and noded: the narrow door to containerd.

Reading order:
config           the service's settings
identifiers      sandbox ids, API keys, tokens
egress           which addresses a sandbox may reach
metric_sample    what a sandbox used at one moment
guest_http       asking a guest's envd, bounded
node             noded: sandboxes through containerd
store            teams, keys, templates, owners of sandboxes
keys             API keys from the command line
node_client      the API's side of noded's door
json_body        bodies with bounds, field by field
network_rules    E2B's network objects
sandbox_bodies   E2B's create bodies and list queries
sandbox_answers  E2B's sandbox objects
sandbox_logs     what envd logged
coded_errors     errors that E2B has a word for
control_plane    the verbs, without HTTP
create_once      creates with an Idempotency-Key
http_errors      errors as E2B's bodies
access           API keys of requests
resources        the routes of sandboxes
snapshot_routes  what needs snapshots: refused
activity_routes  metrics and logs
app              the WSGI application
data_route       which sandbox a data-plane request names
route_app        the application behind nginx's auth_request
nginx            nginx's configuration
web_server       gunicorn, set up from code
__main__         the API's process
route_server     the router's process
serve            everything in the foreground
"""
