# Few verbs, no logic. `make run` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
DOCKER ?= docker
TARGET ?= cuda
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DO_NOT_TRACK = 1
export OMP_WAIT_POLICY = PASSIVE

.PHONY: run demo test faults containers soak check bench image deploy clean

run: .venv/.installed
	$(BIN)/python -m flows.train_model configs/weather_quick.toml $(ARGS)

demo: .venv/.installed
	for config in configs/*_quick.toml; do $(BIN)/memfit run $$config $(ARGS) || exit; done

test: .venv/.installed
	$(BIN)/python -m pytest --ignore tests/faults -m "not end_to_end and not server and not docker" $(ARGS)

faults: .venv/.installed
	$(BIN)/python -m pytest --ignore tests/faults -m "end_to_end or server" $(ARGS)
	$(BIN)/python -m pytest tests/faults $(ARGS)

containers: .venv/.installed
	$(BIN)/python -m pytest -m docker $(ARGS)

soak: .venv/.installed
	MEMFIT_KILLS=500 $(BIN)/python -m pytest --timeout 0 tests/faults/test_killed_children.py -k random $(ARGS)

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile

bench: .venv/.installed
	$(BIN)/python -m benchmarks.step_overhead $(ARGS)

image:
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --target $(TARGET) --tag memfit:$(TARGET) \
		--build-arg COMMIT=$$(git rev-parse HEAD) --build-arg CREATED=$$(git log -1 --format=%cI) \
		--build-arg VERSION=$$(git describe --tags --always --dirty) $(ARGS) .

deploy: .venv/.installed
	$(BIN)/python -m flows.install_deployments $(ARGS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
