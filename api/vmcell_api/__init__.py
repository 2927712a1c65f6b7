"""The E2B control plane, and noded: the narrow door to containerd.

Reading order:
config           the service's settings
identifiers      sandbox ids, API keys, tokens
node             noded: sandboxes through containerd
store            teams, keys, templates, owners of sandboxes
keys             API keys from the command line
node_client      the API's side of noded's door
build_client     the API's side of noded's builds
json_body        bodies with bounds, field by field
sandbox_bodies   E2B's create bodies and list queries
sandbox_answers  E2B's sandbox objects
template_names   names and tags of templates
template_bodies  E2B's template bodies and log queries
template_answers  E2B's template, build and tag objects
upload_store     files that clients upload for templates
template_plane   templates and builds, without HTTP
control_plane    the verbs, without HTTP
http_errors      errors as E2B's bodies
access           API keys of requests
request_body     bodies of requests
encoded_paths    paths with encoded slashes
resources        the routes
template_routes  the routes of templates
app              the WSGI application
data_route       which sandbox a data-plane request names
route_app        the application behind nginx's auth_request
nginx            nginx's configuration
web_server       gunicorn, set up from code
__main__         the API's process
route_server     the router's process
serve            everything in the foreground
"""
