"""What envd reads and writes, as bytes in and values out; nothing here does I/O.

Reading order:
target     a request target's path and query
body       where a request's body ends
fields     proto3 JSON messages, field by field
gotext     Go's texts: FileMode, RFC 3339 times, `signal: killed`
codec      messages as JSON and as protobuf
envelope   Connect's frames on a stream
compression  gzip as clients send it
multipart  multipart/form-data in bounded memory
headers    HTTP dates, ranges, content types, Basic credentials
signature  signed file URLs
"""
