# Each target sets up what it needs, from nothing but Python >= 3.11 (or PYTHON=/path/to/python3).

VENV := .venv
BIN := $(VENV)/bin
CODE := adapters graphs exporter tests examples benchmarks
# One process a core with one thread each: tiny models gain nothing from more threads.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
# What transformers 4.57 and the oldest onnxruntime can change: loading, hooks, folds, the models
# behind them; graphs and kernels.
TESTS_4_57 := $(addprefix tests/adapters/, activations localization measurement fitting \
	composition analysis test_loading.py test_attach.py test_fingerprint.py) \
	tests/exporter/test_merge.py tests/exporter/test_verify.py \
	tests/exporter/test_peft_export.py tests/exporter/test_code_export.py \
	tests/adapters/test_modeling_austeer.py tests/test_routes.py \
	tests/test_foreign_graphs.py tests/serving/test_optimum_ort.py tests/graphs
TESTS_SERVING := tests/serving tests/test_foreign_graphs.py \
	tests/exporter/quantized tests/adapters/test_pairs.py
# Its random models have other weights, on which the small fits of test_fit need not succeed.
ANY_MODEL := "not test_fit or real"

.PHONY: demo test test-shapes check test-optimum test-serving test-llama venv venv-optimum \
	venv-serving venv-llama npm clean

demo: venv ## steer the embedded model; before and after, from both products
	$(BIN)/python examples/demo.py

test: venv ## the whole test-suite, but for the examples that need a runtime of their own
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m "not runtimes"

test-shapes: venv ## arrays have the shapes and dtypes that signatures state
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) --jaxtyping-packages=austeer,shape_checks.check \
		-m "not (runtimes or slow or unchecked)" tests/adapters tests/graphs tests/exporter

check: venv ## lint, formatting, strict types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(addprefix -p austeer., adapters graphs exporter)

test-optimum: venv-optimum ## the tests that transformers 4.57 and onnxruntime 1.24 can change
	OMP_NUM_THREADS=1 $(VENV)-optimum/bin/pytest $(PARALLEL) $(TESTS_4_57) -k $(ANY_MODEL)

test-serving: venv-serving npm ## the serving examples on their runtimes; formats with their libraries
	OMP_NUM_THREADS=1 $(VENV)-serving/bin/pytest $(PARALLEL) $(TESTS_SERVING)

test-llama: venv-llama ## opt-in: a folded model, and base with LoRA, in real llama.cpp
	OMP_NUM_THREADS=1 LLAMA_CPP=$(VENV)-llama/llama.cpp \
		$(VENV)-llama/bin/pytest tests/serving/test_llama_cpp.py

venv:
	@.ci/venv $(VENV) cpu,dev,bench constraints.txt

venv-optimum:
	@.ci/venv $(VENV)-optimum cpu,optimum,peft,dev constraints-optimum.txt

venv-serving:
	@.ci/venv $(VENV)-serving cpu,serving,readers,peft,dev constraints-serving.txt

venv-llama:
	@.ci/venv $(VENV)-llama cpu,peft,dev constraints.txt
	@.ci/llama $(VENV)-llama

npm: ## the JavaScript runtimes; their install scripts fetch what is not needed
	@command -v npm >/dev/null || { echo "no npm: the examples in JavaScript are skipped" >&2; exit 0; }; \
	for folder in node web; do (cd examples/serving/$$folder && npm ci --ignore-scripts --no-fund --no-audit --loglevel=error) || exit 1; done

clean: ## remove everything that the targets above made
	rm -rf $(VENV) $(VENV)-optimum $(VENV)-serving $(VENV)-llama build dist demo_out *.egg-info
	rm -f graphs/*austeer_ops.*
	rm -rf examples/serving/*/node_modules
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
