"""Load tests of a node: what do clients notice of a planned event, and of a fault?

Each event gets a node of its own in network namespaces (`nodeproxy.sandbox`), an agent started as an operator would, and a
load of connections from a pod, from the node and from outside (`nodeproxy.sandbox.load`):

- `cluster` holds the Services and their backends, which can be replaced one by one as a Deployment does it.
- `feeds` tells agents about them: a directory of manifests, or an API server that can be stopped.
- `field` puts the node, the backends, the agent and the load together; `agents` are the programs that run on it.
- `events` are what happens to it; `runs` carries one out and makes a `Row` of what clients noticed; `report` shows rows.

`python -m hack.soak --help` tells the options; `tests/load` runs the same events, shorter.
"""
