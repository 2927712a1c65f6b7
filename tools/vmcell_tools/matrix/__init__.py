"""Which call of which client in which version works against this service: `vmcell matrix`.

Clients are the published packages, unmodified, each version in an environment of its own in the
build cache. A driver makes the calls and prints one line for each; nothing here knows the wire.

Reading order:
clients       packages and versions, and how each finds a service
installation  one version in an environment of its own
domain_front  TLS and names for clients that know no URL of a service
drivers       the calls, run by each client's own interpreter
services      the service they are run against, and whether its machine was lost
running       one client against a service
table         results as tables for people and for the docs
keeping       results on disk, so that a run can go on where it ended
"""
