"""Export a transformers model to ONNX with its KV cache, then graft an adapter onto it."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from austeer.adapters._errors import RouteError
from austeer.adapters._files import write_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import TRANSFORMERS_4, architecture_of, text_config
from austeer.adapters.card import model_card
from austeer.adapters.fingerprint import module_reader
from austeer.exporter.onnx_decoder import WRAPPED, CachedDecoder, example_inputs
from austeer.exporter.routes import check_gains
from austeer.graphs.graft import apply_plan
from austeer.graphs.graft_plan import ScaleAs, plan_graft
from austeer.graphs.model_io import save_model
from austeer.graphs.tidy import tidy_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "model.onnx"

_USAGE = """```python
from austeer.graphs import OnnxCausalLM  # onnxruntime and numpy, no torch

model = OnnxCausalLM("this/folder")
tokens = model.generate(tokenizer("Once upon a time", return_tensors="np").input_ids, 64)
```

`model.onnx` runs on stock onnxruntime without this package; inputs and outputs have the names
that optimum gives them."""


def write_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: SteeringAdapter,
    folder: Path,
    *,
    scale: float = 1.0,
    scale_as: str = ScaleAs.CONSTANT,
    force: bool = False,
    own_base: bool = True,
) -> Path:
    """Write the steered model as ONNX, with config, tokenizer and model card, into `folder`.

    A bfloat16 model is written in float32, which holds the same weights: onnxruntime's CPU
    provider does not compute in bfloat16.

    Args:
        model: the adapter's base; it is not changed.
        tokenizer: written beside the graph.
        adapter: what to steer.
        folder: an existing directory.
        scale: strength factor, in the graph as `austeer.scale`.
        scale_as: a `ScaleAs`: whether the factor is a graph input instead.
        force: accept a base model with other weights.
        own_base: whether it is the adapter's base, for the model card.

    Returns:
        The path of `model.onnx`.

    Raises:
        AdapterError: the model is not the adapter's base (unless `force`).
        RouteError: the model cannot be exported to ONNX, or nothing is steered.
        GraphError: a site cannot be found in the exported graph, or a predictor has a rank
            that the compiled kernels do not take.
        OutputError: the files cannot be written.
    """
    adapter.check_base(module_reader(model), text_config(model).num_hidden_layers, force)
    check_gains([adapter], scale, scale_as)
    # What cannot be grafted is refused before an export that takes minutes.
    plan = plan_graft(adapter, scale, ScaleAs(scale_as))
    model = _runnable(model)
    graph = export_graph(model)
    apply_plan(graph, plan)
    path = folder / MODEL_NAME
    save_model(graph, path)
    _write_companions(model, tokenizer, folder)
    card = model_card(
        adapter.config, "finetune", "onnx", _USAGE, scale=scale, own_base=own_base
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return path


def export_base(model: PreTrainedModel, path: Path) -> None:
    """Write the unsteered model to the new file `path`, as ONNX with KV cache.

    Raises:
        RouteError: the model cannot be exported to ONNX.
        OutputError: the file exists or cannot be written.
    """
    save_model(export_graph(model), path)


def export_graph(model: PreTrainedModel) -> ir.Model:
    """The unsteered model as an ONNX graph with KV cache, any batch, any lengths.

    Inputs and outputs have optimum's names. One graph serves prefill (past length 0) and
    decoding. Weights are shared with `model`, which is not changed.

    Raises:
        ModelError: the architecture is not supported.
        RouteError: the model cannot be exported to ONNX.
    """
    architecture_of(model.config.model_type)
    check_exportable(model)
    with ExitStack() as stack:
        stack.enter_context(_silence())
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        program = _trace(model)
    graph = program.model
    tidy_causal_lm(graph, text_config(model).num_hidden_layers, WRAPPED)
    return graph


def _runnable(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).float() if model.dtype == torch.bfloat16 else model


def _write_companions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    config = json.loads(model.config.to_json_string())
    # transformers 4 calls it torch_dtype; the graph may hold another than the checkpoint.
    dtype = str(model.dtype).removeprefix("torch.")
    config |= {name: dtype for name in ("dtype", "torch_dtype") if name in config}
    write_json(folder / "config.json", {**config, "architectures": [type(model).__name__]})
    if model.generation_config is not None:
        # Not `save_pretrained`: it refuses settings that many published models have.
        generation = json.loads(model.generation_config.to_json_string())
        write_json(folder / "generation_config.json", generation)
    tokenizer.save_pretrained(folder)


def check_exportable(model: PreTrainedModel) -> None:
    """Refuse an architecture, or a config, of which no graph can be made.

    Raises:
        RouteError: says which, and the route that works.
    """
    if getattr(model.config, "alibi", False):
        raise RouteError(
            f"{model.config.model_type}: its ALiBi is computed in bfloat16, which the CPU "
            "provider of onnxruntime does not do; fold into safetensors instead"
        )
    if model.config.model_type == "mpt" and TRANSFORMERS_4:
        raise RouteError(
            "mpt: transformers 4 gives a graph with other logits; export it with transformers "
            "5, or fold into safetensors"
        )
    if text_config(model) is not model.config:
        raise RouteError(
            f"{model.config.model_type}: a vision-language model also reads images, for which "
            "no graph is made here; fold into safetensors instead"
        )
    if TRANSFORMERS_4 and architecture_of(model.config.model_type).mixture:
        raise RouteError(
            f"{model.config.model_type}: in transformers 4 its experts are chosen by a loop "
            "that no graph can hold; export it with transformers 5, or fold into safetensors"
        )
    if model.config.model_type == "llama4_text":
        raise RouteError(
            "llama4_text: its rotary embedding is computed in complex numbers, which ONNX does "
            "not have; fold into safetensors instead"
        )
    parameters = getattr(model.config, "rope_parameters", None) or getattr(
        model.config, "rope_scaling", None
    )
    kind = (parameters or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise RouteError(
            f"rope_type {kind!r}: its frequencies depend on the length, which one ONNX graph "
            "cannot follow; fold into safetensors instead"
        )


def _trace(model: PreTrainedModel) -> torch.onnx.ONNXProgram:
    arguments, shapes = example_inputs(model)
    try:
        exported = torch.export.export(
            CachedDecoder(model), arguments, dynamic_shapes=shapes, strict=False
        )
        program = torch.onnx.export(exported, args=(), dynamo=True, verbose=False)
    except Exception as error:
        # torch wraps whatever it meets in errors of its own, many without a common base.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RouteError(
            f"{model.config.model_type}: torch cannot export this model to ONNX ({reason})"
        ) from error
    if program is None:
        raise RouteError(f"{model.config.model_type}: torch returned no ONNX model")
    return program


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, attention and experts that can be traced; all as before on exit."""
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation
    experts = getattr(model.config, "_experts_implementation", None)
    model.eval()
    if attention not in ("eager", "sdpa"):
        model.config._attn_implementation = "eager"
    if experts is not None:
        # The others loop over the experts that were chosen: no constant graph.
        model.config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        if experts is not None:
            model.config._experts_implementation = experts
        for module in training:
            module.training = True


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no log lines from the exporter: none is about the user's model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
