# Bare `make` lists the targets. Everything lives in .venv; a second call installs nothing again.
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/pip --disable-pip-version-check --quiet
TORCH   := torch==2.13.0
BUNDLE  := export/reference/bundle
STAMPS  := $(VENV)/.stamps

DEMO_ARGS  ?=
BENCH_ARGS ?=
# --shape qwen2.5-0.5b adds the larger shape, --write-docs rewrites docs/benchmarks-export.*
FIGURES_ARGS ?=
# --model all adds the larger shape and the trained model, --write-docs rewrites docs/benchmarks.*
DECISIONS_ARGS ?=
TEST_ARGS  ?=
# Tests of one file stay in one process. More than two processes want more memory than a small machine has.
TEST_JOBS  ?= 2
# Private half of edge_agent/keys/reference.pub.pem. Without it a changed bundle is signed with your own developer key.
REFERENCE_KEY ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow bench reference wheel docs format clean
.PHONY: check check-format check-lint check-types check-imports check-ansible check-units

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo ## the whole path on one machine: plant, device, updates (DEMO_ARGS="--seconds 40 --json out.json")
	$(BIN)/edge-deploy demo $(DEMO_ARGS)

test: $(STAMPS)/dev ## every test but the slow ones (TEST_ARGS="-k spool")
	@.ci/debian_packages.sh $$(.ci/test_packages.sh) || echo "tests that need them are reported as not run"
	ORT_DISABLE_TELEMETRY=1 $(BIN)/python -m pytest --numprocesses=$(TEST_JOBS) --dist=loadfile -m "not slow" $(TEST_ARGS)

test-slow: $(STAMPS)/dev ## the slow ones: other processors emulated, whole models, the demo
	@.ci/debian_packages.sh $$(.ci/test_packages.sh) || echo "tests that need them are reported as not run"
	@PYTHON=$(BIN)/python .ci/arm64_root.sh || echo "tests on an emulated Arm are reported as not run"
	@PYTHON=$(BIN)/python .ci/openvino_venv.sh || echo "tests with OpenVINO are reported as not run"
	ORT_DISABLE_TELEMETRY=1 $(BIN)/python -m pytest --numprocesses=$(TEST_JOBS) --dist=loadfile -m slow $(TEST_ARGS)

check: check-format check-lint check-types check-imports check-ansible check-units ## format, lint, types, import rules, Ansible and systemd files

check-format: $(STAMPS)/dev
	$(BIN)/ruff format --check .

check-lint: $(STAMPS)/dev
	$(BIN)/ruff check .

check-types: $(STAMPS)/dev
	$(BIN)/mypy

check-imports: $(STAMPS)/dev
	$(BIN)/lint-imports

check-ansible: $(STAMPS)/dev
	.ci/check_ansible.sh $(BIN)

check-units:
	.ci/check_units.sh

bench: $(STAMPS)/dev ## decisions per second and the exporter's figures, beside their peers' (about 16 minutes; the first time 40)
	$(BIN)/edge-agent bench --bundle $(BUNDLE) $(BENCH_ARGS)
	$(BIN)/python -m tests.bench.decision_figures $(DECISIONS_ARGS)
	$(BIN)/python -m tests.bench.export_figures $(FIGURES_ARGS)

reference: $(STAMPS)/dev ## train the reference model and build its bundle from nothing (an hour on two cores)
	$(BIN)/python -m export.reference --work build/reference --install
	$(BIN)/python -m export.reference.bundle_build --measure $(if $(REFERENCE_KEY),--sign-key $(REFERENCE_KEY))

# From a fresh copy of build/: setuptools would carry files over that no longer exist.
wheel: $(STAMPS)/demo ## build dist/edge_agent-VERSION-py3-none-any.whl, what a gateway installs
	rm -rf build/lib build/bdist.*
	$(PIP) wheel --no-deps --wheel-dir dist .
	@ls dist/edge_agent-*.whl

docs: $(STAMPS)/dev ## regenerate the pages that are made from code
	$(BIN)/python docs/configuration_page.py > docs/configuration.md

format: $(STAMPS)/dev ## put every file into the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what these targets made, the environment too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache out.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@test -x $(BIN)/python || .ci/make_venv.sh $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(STAMPS)/venv pyproject.toml
	@echo "installing the device and the demo (no torch)"
	@$(PIP) install --editable '.[fleet,demo]'
	@touch $@

# First and alone: resolved together with the rest, torch may bring several GB of GPU libraries.
$(STAMPS)/torch: $(STAMPS)/venv
	@echo "installing $(TORCH)"
	@$(PIP) install '$(TORCH)'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml
	@echo "installing everything that tests and checks need"
	@$(PIP) install --editable '.[export,npu,fleet,demo,bench,dev]'
	@touch $(STAMPS)/demo $@
