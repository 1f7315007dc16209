# Each target sets up what it needs, from nothing but Python >= 3.11 (or PYTHON=/path/to/python3).

VENV := .venv
BIN := $(VENV)/bin
CODE := adapters graphs exporter tests examples benchmarks
# What transformers 4.57 changes: loading, hooks, folds, and the models behind them.
TESTS_4_57 := tests/adapters tests/exporter

.PHONY: demo test check test-optimum venv venv-optimum clean

demo: venv ## steer the embedded model; before and after, from both products
	$(BIN)/python examples/demo.py

test: venv ## the whole test-suite
	$(BIN)/pytest

check: venv ## lint, formatting, strict types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test-optimum: venv-optimum ## the tests that transformers 4.57 can change
	$(VENV)-optimum/bin/pytest $(TESTS_4_57)

venv:
	@.ci/venv $(VENV) cpu,dev constraints.txt

venv-optimum:
	@.ci/venv $(VENV)-optimum cpu,optimum,dev constraints-optimum.txt

clean: ## remove everything that the targets above made
	rm -rf $(VENV) $(VENV)-optimum build dist demo_out *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
