"""A load of connections through a node, of bounded rate and count, and the servers that answer it.

- `plan` holds what a generator is told to do and what it reports: frozen structs that travel between processes as JSON.
- `generator` starts generators and the server process from here; `children` is how these processes are talked to.
- `client` is a generator's process, in one namespace. `short`, `streams` and `datagrams` are its three kinds of load; all
  work in one loop (`loop`), and `tally` counts what becomes of each request.
- `server` is the one process that serves all backends, each in its namespace.

Times are in seconds; moments in reports are seconds since the load began.
"""
