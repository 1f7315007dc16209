# Each target sets up what it needs, from nothing but Python >= 3.11 (or PYTHON=/path/to/python3).

VENV := .venv
BIN := $(VENV)/bin
CODE := adapters graphs exporter tests examples benchmarks
# One process a core with one thread each: tiny models gain nothing from more threads.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
# What transformers 4.57 can change: loading, hooks, folds, and the models behind them.
TESTS_4_57 := $(addprefix tests/adapters/, activations localization measurement fitting \
	composition analysis test_loading.py test_attach.py test_fingerprint.py) \
	tests/exporter/test_merge.py tests/exporter/test_verify.py tests/test_routes.py
# Its random models have other weights, on which the small fits of test_fit need not succeed.
ANY_MODEL := "not test_fit or real"

.PHONY: demo test check test-optimum venv venv-optimum clean

demo: venv ## steer the embedded model; before and after, from both products
	$(BIN)/python examples/demo.py

test: venv ## the whole test-suite
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

check: venv ## lint, formatting, strict types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(addprefix -p austeer., adapters graphs exporter)

test-optimum: venv-optimum ## the tests that transformers 4.57 can change
	OMP_NUM_THREADS=1 $(VENV)-optimum/bin/pytest $(PARALLEL) $(TESTS_4_57) -k $(ANY_MODEL)

venv:
	@.ci/venv $(VENV) cpu,dev,bench constraints.txt

venv-optimum:
	@.ci/venv $(VENV)-optimum cpu,optimum,dev constraints-optimum.txt

clean: ## remove everything that the targets above made
	rm -rf $(VENV) $(VENV)-optimum build dist demo_out *.egg-info
	rm -f graphs/*austeer_ops.*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
