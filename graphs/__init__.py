"""Steered ONNX graphs: operators with portable bodies, graft, files, and a runner."""

from __future__ import annotations

from austeer.graphs.custom_op import custom_op_library, register
from austeer.graphs.function import steer_function, steer_functions
from austeer.graphs.graft import GraftGainPass, graft_file, graft_model
from austeer.graphs.locate import Place, SiteLocator
from austeer.graphs.model_io import load_model, save_model
from austeer.graphs.opset import STEER_AU, STEER_AU_ADAPTIVE, SteerOp
from austeer.graphs.session import OnnxCausalLM

__all__ = [
    "STEER_AU",
    "STEER_AU_ADAPTIVE",
    "GraftGainPass",
    "OnnxCausalLM",
    "Place",
    "SiteLocator",
    "SteerOp",
    "custom_op_library",
    "graft_file",
    "graft_model",
    "load_model",
    "register",
    "save_model",
    "steer_function",
    "steer_functions",
]
