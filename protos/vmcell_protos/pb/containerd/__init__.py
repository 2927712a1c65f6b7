"""The subset of containerd's gRPC services that noded calls; generated from `../containerd`.

Reading order:
types_pb2            mounts, descriptors, processes
version_pb2          version: messages
version_pb2_grpc     version: stub
namespaces_pb2       namespaces: messages
namespaces_pb2_grpc  namespaces: stub
leases_pb2           leases: messages
leases_pb2_grpc      leases: stub
content_pb2          content store: messages
content_pb2_grpc     content store: stub
images_pb2           images: messages
images_pb2_grpc      images: stub
snapshots_pb2        snapshots: messages
snapshots_pb2_grpc   snapshots: stub
containers_pb2       container records: messages
containers_pb2_grpc  container records: stub
tasks_pb2            tasks: messages
tasks_pb2_grpc       tasks: stub
events_pb2           events: messages
events_pb2_grpc      events: stub
"""
