"""Benchmarks: how fast agents program a large cluster state and its changes, ours next to any kube-proxy, in the same run.

Each run is a node of its own in network namespaces (`nodeproxy.sandbox`) with the real iptables tools and a real kernel.
The scenarios, a module each:

- `startup` is one process from its start to its end: first sync, then single changes (`changing`) and idling (`idle`).
  `scale` is that for states of several sizes.
- `rolling` replaces the pods of a Deployment one by one under a load of connections (`stream`).
- `churning` moves endpoints of random Services, a hundred a second.
- `connecting` times connect() among few and many Services.

What they stand on:

- `feeds` holds the cluster state and changes it: a directory of manifests, a real API server (`hack.controlplane`), or one
  that only serves what it is given (`static_api`). `objects` are what it consists of.
- `agents` starts nodeproxy or kube-proxy as an operator would, and says when it claims to be ready; `node` is where.
- `datapath` asks the kernel with packets who serves a cluster IP now, and how long `connect()` takes.
- `rules`, `virtual_servers` and `processes` read what the kernel and /proc say afterwards.
- `options` is the command line, `session` carries it out.
- `results` are the figures, `figures` which of them are shown and what is wanted of them, `report`, `grid` and `plot` show
  them: in a terminal, as markdown, as SVG.

`python -m hack.bench --help` tells the options.
"""
