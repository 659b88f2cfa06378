"""Benchmarks: how fast the agent programs a large cluster state and its changes, next to any kube-proxy, in the same run.

Each run is a node of its own in network namespaces (`nodeproxy.sandbox`) with the real iptables tools and a real kernel:

- `feeds` holds the cluster state and changes it: a directory of manifests, a real API server (`hack.controlplane`), or one
  that only serves what it is given (`static_api`).
- `agents` starts nodeproxy or kube-proxy as an operator would, and says when it claims to be ready.
- `datapath` asks the kernel with packets who serves a cluster IP now, and how long `connect()` takes.
- `rules`, `virtual_servers` and `processes` read what the kernel and /proc say afterwards.
- `idle` tells what an agent uses when it is left alone.
- `scenarios` put these together; `results` are the figures, `report` and `plot` show them.

`python -m hack.bench --help` tells the options.
"""
