# Every target is what CI calls too. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
INVENTORY ?= inventory/lab
STAGE := tools/stage
STAMP = .venv/.complete-$(shell cat requirements.txt files/requirements/installer.txt | sha256sum | cut -c1-12)

# What the controller of a lab needs, as Debian packages.
TOOLS := ca-certificates chromium chromium-driver curl debian-archive-keyring iproute2 mmdebstrap openssh-client python3-venv systemd-container util-linux
PYTHON_FILES := gateway predictor bench bench/gateway/run bench/gateway/saturate bench/predictor/run lab plugins tests tools molecule roles/vllm/files/citadel-engine roles/vllm/files/citadel-fetch roles/escalator/files/citadel-escalator roles/exporters/files/citadel-unit-metrics roles/exporters/files/ask.py lab/lab

.PHONY: help tools venv lab down test check lint types unit molecule e2e scenarios validate dashboards docs lock bench soak

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

tools: ## install the Debian packages that the lab needs (root)
	@missing=$$(for p in $(TOOLS); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing:" $$missing; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi

venv: $(STAMP) ## the control node's tools in .venv, from the hash-locked requirements.txt

.venv/.complete-%:
	@echo "making .venv"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r files/requirements/installer.txt
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.txt
	@rm -f .venv/.complete-*
	@touch $@

lab: tools venv ## boot the lab, run site.yml on it, and print a curl that answers
	@lab/lab up
	@lab/lab play playbooks/site.yml
	@$(BIN)/python lab/greet.py

down: ## stop the lab; nothing is left but the cache
	@lab/lab down

check: venv ## lint, types, unit and contract tests: neither root nor the lab
	@$(STAGE) 'lint and types' 150 $(MAKE) --no-print-directory -j2 lint types
	@$(STAGE) unit 360 $(MAKE) --no-print-directory unit

lint: venv
	ruff check $(PYTHON_FILES)
	ruff format --check $(PYTHON_FILES)
	yamllint --strict .
	ansible-lint --strict
	$(BIN)/python tools/role_readme.py --check
	$(BIN)/python -m tools.dashboards --check

types: venv # two scripts are named run, and mypy knows a script by its name
	mypy $(filter-out bench/predictor/run,$(PYTHON_FILES))
	mypy bench/predictor/run

unit: venv # side by side, then those that take the time of something
	@tools/servers
	pytest --numprocesses=auto --maxprocesses=4 -m 'not alone' --cov --cov-report= --durations=10
	pytest -m alone --cov --cov-append --cov-report=term:skip-covered --cov-fail-under=90

molecule: venv ## one scenario: make molecule S=gateway
	@test -n "$(S)" || { echo "which scenario? make molecule S=$$(ls -m molecule | tr -d ' \n' | sed 's/,/ or S=/g')" >&2; exit 2; }
	lab/lab exec sh -c 'molecule reset -s $(S) && molecule test -s $(S)'

test: tools venv check ## everything: check, each molecule scenario, site.yml on the lab, end-to-end tests
	@$(STAGE) images 420 lab/lab prepare
	@test ! -d tests/browser || $(STAGE) browser 120 pytest tests/browser
	@$(STAGE) --last scenarios 2400 lab/lab exec pytest tests/scenarios tests/e2e -v --durations=25

e2e: tools venv ## the end-to-end tests on the lab
	lab/lab exec pytest tests/e2e -v

ASK := pytest -q --no-header --tb=no -rN --criteria -p no:cacheprovider --ansible-inventory=$(INVENTORY)
ON_METRICS := $(foreach role,monitoring escalator predictor,tests/infra/test_$(role).py)
validate: venv ## ask every product whether it answers: make validate INVENTORY=inventory/production
	@$(if $(findstring inventory/lab,$(INVENTORY)),lab/lab exec) sh -c 'status=0; \
	  $(ASK) $(ON_METRICS) --hosts=ansible://metrics_servers,ansible://predictor_servers || status=1; \
	  $(ASK) tests/infra/test_exporters.py --hosts=ansible://monitored || status=1; \
	  $(ASK) tests/infra $(ON_METRICS:%=--ignore=%) --ignore=tests/infra/test_exporters.py --hosts=ansible://llm_servers || status=1; \
	  exit $$status'

dashboards: venv ## write Grafana's dashboards anew, and draw them for the docs
	@tools/servers
	$(BIN)/python -m tools.dashboards
	$(BIN)/python -m tests.monitoring.draw docs/images

docs: venv ## write the roles' READMEs anew from their argument_specs
	$(BIN)/python tools/role_readme.py

lock: venv ## resolve and lock all requirements anew
	files/requirements/lock.sh
	uv pip compile requirements.in --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements.txt

bench: venv ## gateways side by side (bench/gateway); on a lab that is up also a site.yml with nothing to change, by role and task
	@tools/servers
	bench/gateway/run --install
	bench/gateway/run --scrape
	! test -e /run/citadel-lab || bench/gateway/saturate
	! test -e /run/citadel-lab || $(BIN)/python tools/profile_play.py --budget 120 lab/lab play playbooks/site.yml

soak: venv ## ten million events through one worker of the gateway: its memory must stay flat
	@tools/servers
	bench/gateway/run --soak 10000000
