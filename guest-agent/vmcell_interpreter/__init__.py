"""The code interpreter: E2B's server on port 49999, part of the image `code-interpreter-v1`.

It runs inside the sandbox, beside the code it serves, and is restarted by its supervisor when it
dies. The wire is E2B's (`POST /execute`, `/contexts`, `GET /health`); kernels are Jupyter's where
there is one, and Node with a driver of ours. Needs what the image's lock file names: tornado and
jupyter_client here, ipykernel in `python_kernel`.

Reading order:
requests           bodies of requests, checked
languages          names of languages, and which kernel serves them
lines              the lines of an answer, as bytes
mime               Jupyter's MIME bundles as E2B's results
kernel             what a kernel is to the rest, and what it says
shell_words        environment variables as code for bash
python_kernel      what runs inside the Python kernel
jupyter_kernel     a kernel that speaks Jupyter's protocol
kernel_programs    the commands of those, and variables in them
javascript_kernel  Node and its driver
kernel_choice      which kernel serves a language
client             one connection that listens to a run
context            a kernel with its state, one run at a time
contexts           all contexts and the default ones
sandbox_env        the sandbox's global environment, from envd
server             the HTTP routes
__main__           the process
"""
