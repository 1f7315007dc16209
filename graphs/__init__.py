"""Steered ONNX graphs: operators with portable bodies, graft, files, and a runner."""

from __future__ import annotations

from austeer.graphs.custom_op import custom_op_library, register
from austeer.graphs.function import steer_function, steer_functions
from austeer.graphs.graft import GraftGainPass, apply_plan, graft_file, graft_model
from austeer.graphs.graft_plan import (
    GraftPlan,
    ScaleAs,
    SteeringNode,
    plan_graft,
    plan_switchable_graft,
)
from austeer.graphs.locating.locate import SiteLocator
from austeer.graphs.locating.places import Place
from austeer.graphs.model_io import load_model, save_model
from austeer.graphs.opset import STEER_AU, STEER_AU_ADAPTIVE, SteerOp
from austeer.graphs.session import OnnxCausalLM
from austeer.graphs.ungraft import remove_graft

__all__ = [
    "STEER_AU",
    "STEER_AU_ADAPTIVE",
    "GraftGainPass",
    "GraftPlan",
    "OnnxCausalLM",
    "Place",
    "ScaleAs",
    "SiteLocator",
    "SteerOp",
    "SteeringNode",
    "apply_plan",
    "custom_op_library",
    "graft_file",
    "graft_model",
    "load_model",
    "plan_graft",
    "plan_switchable_graft",
    "register",
    "remove_graft",
    "save_model",
    "steer_function",
    "steer_functions",
]
