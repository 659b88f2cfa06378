"""What the tests of a real cluster stand on.

- `settings` is what the environment asks for, `kind` the cluster that `hack.kind` made.
- `places` are where requests come from (a pod, a node, outside); `asking` is one request and what became of it;
  `flow` are requests without end, of which every failure is counted.
- `objects` makes manifests, `api` puts them into the cluster and takes them out again, `stage` holds the pods that all tests
  share, and `world` is what a test is given.
- `agents` are the agents and `rollouts` the roll-outs of the cluster, seen from outside; `load` is on it meanwhile.
- `waiting` waits for what will become true.

Times are in seconds, those of a machine of usual speed: on a slower one they are longer (`pace`).
"""
