"""The configuration of an agent: a KubeProxyConfiguration file and flags in, one checked `AgentConfig` out."""
