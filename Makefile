# make demo                      the whole loop on the embedded virtual SEM
# make demo SEM_DIR=folder       the same on a folder of micrographs (or one file); MASK_DIR=folder: its expert masks
# make serve                     the champion over HTTP, until Ctrl-C; PORT=5001: where
# make test | lint | dashboards | clean
#
# Every target sets up what it needs: virtual environment, pinned packages, ZenML stack, MLflow, DVC.

PYTHON ?= python3.11
SEM_DIR ?=
MASK_DIR ?=
PORT ?= 5001
$(if $(MASK_DIR),$(if $(SEM_DIR),,$(error MASK_DIR=$(MASK_DIR) without SEM_DIR; SEM_DIR=folder names the micrographs that the masks belong to)))

ENV := . ./env.sh
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-cache-dir --quiet

# Set up anew whenever the environment points it elsewhere.
PLACES := $(shell $(ENV) && echo "$$ZENML_CONFIG_PATH $$ZENML_STORE_URL $$ZENML_ACTIVE_STACK_ID $$MLFLOW_TRACKING_URI" | cksum | cut -d' ' -f1)
INSTALLED := .venv/.installed
STACK := .graincast/stack-$(PLACES)

.PHONY: setup demo serve test lint dashboards clean

setup: $(STACK)

$(INSTALLED): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x .venv/bin/pip || { echo "creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "installing the packages of requirements.lock (a few minutes, about 6 GB)"
	@$(PIP) install --no-deps --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(PIP) check
	@touch $@

$(STACK): $(INSTALLED) pipelines/stack.py env.sh
	@echo "setting up the ZenML stack, MLflow and DVC"
	@mkdir -p .graincast && rm -f .graincast/stack-*
	@$(ENV) && python -m pipelines.stack
	@touch $@

demo: setup
	@$(ENV) && config=configs/demo.yaml && \
	if [ -n "$(SEM_DIR)" ]; then \
		config=.graincast/demo-$$$$.yaml && \
		graincast configure configs/demo.yaml --set session.folder="$(SEM_DIR)" \
			$(if $(MASK_DIR),--set session.masks="$(MASK_DIR)") -o $$config; \
	fi && \
	zenml pipeline run pipelines.training.training_pipeline -c $$config

# The answers, limits and kinds of errors are in docs/serving.md.
serve: setup
	@$(ENV) && exec graincast serve --port $(PORT)

# In three processes, as most machines have two processors or more: two of what takes minutes beside the rest. Threads that wait must not
# spin then.
test: setup
	@$(ENV) && export OMP_WAIT_POLICY=PASSIVE && mkdir -p .graincast && { \
		python -m pytest -m "slow and not proof" tests/test_pipeline.py > .graincast/pipeline-tests.log 2>&1 & pipeline=$$!; \
		python -m pytest -m "slow and not proof" --ignore tests/test_pipeline.py > .graincast/slow-tests.log 2>&1 & slow=$$!; \
		python -m pytest -m "not slow and not proof"; fast=$$?; \
		wait $$pipeline; pipeline=$$?; \
		wait $$slow; slow=$$?; \
		cat .graincast/pipeline-tests.log .graincast/slow-tests.log; \
		exit $$((fast | pipeline | slow)); \
	}

lint: $(INSTALLED)
	@$(ENV) && ruff check . && mypy

# ZenML's dashboard stays in the background until `zenml logout --local`; MLflow's runs until Ctrl-C.
dashboards: setup
	@$(ENV) && \
	case "$$ZENML_STORE_URL" in http*) echo "ZenML dashboard: $$ZENML_STORE_URL" ;; *) zenml login --local ;; esac && \
	case "$$MLFLOW_TRACKING_URI" in \
		http*) echo "MLflow dashboard: $$MLFLOW_TRACKING_URI" ;; \
		*) mlflow ui --backend-store-uri "$$MLFLOW_TRACKING_URI" ;; \
	esac

# Everything that runs made, the versions in the DVC cache and the local servers' databases included.
clean:
	rm -rf runs .graincast .zen .dvc/cache .dvc/tmp .pytest_cache .mypy_cache .ruff_cache .hypothesis build
