# Two commands on a fresh machine: `make demo` (the main job on real pictures) and `make test`. Both call `setup` first.
PYTHON ?= python3.11
BIN := .venv/bin
ROOMS := pipelines ops models infra
unexport PYTHONDONTWRITEBYTECODE # set, it makes each of the many processes of Ray and Prefect compile all that it imports

.PHONY: setup check test demo bench chaos

setup: .venv/installed

# pip brings uv, torch and setuptools from the lock (pip sees a CPU build of torch where one is at hand; uv does not), uv the rest.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps "$$(grep -o '^uv==[^ ]*' requirements.lock)" "$$(grep -o '^torch==[^ ]*' requirements.lock)" "$$(grep -o '^setuptools==[^ ]*' requirements.lock)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	$(BIN)/python -c "import torch; assert torch.version.cuda is None or torch.cuda.is_available(), 'a CUDA build of torch without a GPU: see README, Install'"
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest

# The long proofs (many kill rounds): run when the work they prove is finished, recorded in DIARY.md.
chaos: setup
	$(BIN)/pytest tests/chaos

demo: setup
	$(BIN)/armchair demo

# Both sides of a claim about speed, alternating in one run; the last line is one JSON object.
bench: setup
	$(BIN)/python -m tests.bench.$(or $(STAGE),sample)
