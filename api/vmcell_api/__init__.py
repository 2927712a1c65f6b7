"""The E2B control plane, and noded: the narrow door to containerd.

Reading order:
config           the service's settings
identifiers      sandbox ids, API keys, tokens
volumes          volumes on this node's disk
node             noded: sandboxes through containerd
store            teams, keys, templates, owners of sandboxes
keys             API keys from the command line
node_client      the API's side of noded's door
json_body        bodies with bounds, field by field
request_body     the JSON body of a request
sandbox_bodies   E2B's create bodies and list queries
sandbox_answers  E2B's sandbox objects
volume_control   the verbs on volumes, without HTTP
control_plane    the verbs, without HTTP
http_errors      errors as E2B's bodies
access           API keys of requests
resources        the routes
volume_routes    the routes of volumes
app              the WSGI application
data_route       which sandbox a data-plane request names
route_app        the application behind nginx's auth_request
nginx            nginx's configuration
web_server       gunicorn, set up from code
__main__         the API's process
volume_content   the files of volumes over HTTP
volume_server    the process that serves them
route_server     the router's process
serve            everything in the foreground
"""
