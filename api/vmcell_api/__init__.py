"""The E2B control plane, and noded: the narrow door to containerd.

Reading order:
config           the service's settings
identifiers      sandbox ids, API keys, tokens
scopes           what keys may do, and what each route needs
logs             lines of all processes, without secrets
egress           which addresses a sandbox may reach
metric_sample    what a sandbox used at one moment
snapshot_facts   what noded tells of snapshots
guest_http       asking a guest's envd, bounded
volumes          volumes on this node's disk
node             noded: sandboxes through containerd
store            teams, keys, templates, owners of sandboxes
node_channel     gRPC to noded's socket
node_client      the API's side of noded's door
tenancy          what the operator does with teams and keys
metrics          counters for Prometheus
request_rate     how many requests a team may make
build_client     the API's side of noded's builds
json_body        bodies with bounds, field by field
request_bounds   what no request may hold
query_numbers    whole numbers in queries
page_cursor      where the next page of a list begins
network_rules    E2B's network objects
sandbox_bodies   E2B's create bodies and list queries
sandbox_answers  E2B's sandbox objects
sandbox_logs     what envd logged
coded_errors     errors that E2B has a word for
template_names   names and tags of templates
template_bodies  E2B's template bodies and log queries
template_answers  E2B's template, build and tag objects
upload_store     files that clients upload for templates
template_plane   templates and builds, without HTTP
snapshot_catalog  the snapshots of a team
volume_control   the verbs on volumes, without HTTP
control_plane    the verbs, without HTTP
snapshot_plane   pause, resume, snapshots, fork and rollback, without HTTP
create_once      creates with an Idempotency-Key
http_errors      errors as E2B's bodies
access           API keys of requests: team, scopes, rate
request_record   a request's id, log line, counts and audit entry
encoded_paths    paths with encoded slashes
resources        the routes of sandboxes
snapshot_answers  snapshots, forks and rollbacks as JSON
snapshot_routes  the routes that need snapshots
activity_routes  metrics and logs
template_routes  the routes of templates
volume_routes    the routes of volumes
secret_routes    the routes of secrets, refused
openapi          the API's own description, one module per resource
operator_resources  the routes of teams, keys, audit and metrics
app              the WSGI application
data_route       which sandbox a data-plane request names
signature_search  the sandbox of a signed file URL
refusal_answers  what a client is told that goes nowhere
route_app        the application behind nginx's auth_request
nginx            nginx's configuration
nginx_files      that configuration on this host
web_server       gunicorn, set up from code
__main__         the API's process
volume_content   the files of volumes over HTTP
volume_server    the process that serves them
route_server     the router's process
child_processes  children and what they leave behind
supervision      a child that ends is started again
serve            everything in the foreground
"""
