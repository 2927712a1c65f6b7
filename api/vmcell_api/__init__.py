"""The E2B control plane, and noded: the narrow door to containerd.

Reading order:
config           the service's settings
identifiers      sandbox ids, API keys, tokens
node             noded: sandboxes through containerd
store            teams, keys, templates, owners of sandboxes
keys             API keys from the command line
node_client      the API's side of noded's door
json_body        bodies with bounds, field by field
sandbox_bodies   E2B's create bodies and list queries
sandbox_answers  E2B's sandbox objects
control_plane    the verbs, without HTTP
http_errors      errors as E2B's bodies
access           API keys of requests
resources        the routes
app              the WSGI application
data_route       which sandbox a data-plane request names
signature_search  the sandbox of a signed file URL
refusal_answers  what a client is told that goes nowhere
route_app        the application behind nginx's auth_request
nginx            nginx's configuration
nginx_files      that configuration on this host
web_server       gunicorn, set up from code
__main__         the API's process
route_server     the router's process
child_processes  children and what they leave behind
supervision      a child that ends is started again
serve            everything in the foreground
"""
