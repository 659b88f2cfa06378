# Everything a newcomer types. Each target makes itself ready: `make demo` on a fresh Debian machine is enough.
SHELL := /bin/bash
MODE ?= iptables
PYTHON := .venv/bin/python
# IPVS mode runs in a VM where this kernel has no IPVS; the demo does not wait for a kernel to be built for that.
RUN = PATH="$$PWD/.venv/bin:$$PATH" $(if $(filter ipvs,$(MODE)),$(PYTHON) -m hack.vm run --)

.PHONY: help setup demo test lint unit kernel scenes ipvs controlplane takeover takeover-ipvs load e2e conformance compare bench soak format clean

help: ## this list
	@grep -hE '^[a-z0-9]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## system packages and .venv with the console script nodeproxy
	@hack/setup.sh

demo: setup ## a throw-away node: Services answered by what nodeproxy programmed (MODE=iptables|ipvs)
	@HACK_VM_BUILD=no $(RUN) python -m hack.demo --mode $(MODE)

test: setup ## everything that is tested, a progress line per stage (under 15 minutes)
	@hack/test.sh

lint unit kernel scenes ipvs controlplane takeover takeover-ipvs load: setup ## one stage of `make test`
	@hack/test.sh $@

# E2E_KEEP=1 keeps the cluster, and the next run takes it again.
e2e: setup ## end to end in a real kind cluster (MODE=iptables|ipvs; E2E_KEEP=1 keeps it; ARGS="--help")
	@$(if $(filter ipvs,$(MODE)),$(PYTHON) -m hack.vm.e2e,$(RUN) env E2E_MODE=$(MODE) python -m e2e) $(ARGS)

conformance: setup ## Kubernetes' own [sig-network] tests in a kind cluster; the table is kept in e2e/conformance (MODE, ARGS="--help")
	@$(PYTHON) -m $(if $(filter ipvs,$(MODE)),hack.conformance.vm,hack.conformance) $(ARGS)

# 2,000 Services, unless the state to compare is named: ARGS="--snapshot DIR", --manifests, --kubeconfig.
compare: setup ## both modes on the same cluster state, asked about every frontend with real packets (ARGS="--help" tells more)
	@$(PYTHON) -m hack.compare $(ARGS)

bench: setup ## startup, changes, roll-outs, churn, scale, connect latency, idling (ARGS="--help" tells more; "--quick")
	@$(PYTHON) -m hack.bench $(ARGS)

soak: setup ## load on a node while backends are replaced, agents killed, modes switched: does anybody notice? (ARGS="--help")
	@$(PYTHON) -m hack.soak $(ARGS)

format: setup ## ruff format and fixes
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

clean: ## remove .venv and caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
