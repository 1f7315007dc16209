"""The steering operators: domain, version, names and input lists, stated once.

    SteerAU(x: T[..., D], idx: int64[k], gamma: float[k], scale: float[1]) -> y: T[..., D]
    SteerAUAdaptive(x, idx, gamma, V: float[k, r], b: float[r], U: float[r, k], scale) -> y

T is float, float16 or bfloat16; every input is required. `idx` holds numbers from 0 to D-1, in
any order, none twice; what else is given as a run's input is undefined: function bodies count
negative ones from the end and steer a unit that is there twice once, kernels on a CPU refuse
both, kernels on a GPU see neither. The compiled kernels take r up to `MAX_RANK`.
`y` is `x` with the k selected entries of its last axis multiplied by a gain, in float32,
rounded once:

    SteerAU          gain = 1 + scale · gamma
    SteerAUAdaptive  gain = 1 + scale · gamma · phi,  phi = 4 · sigmoid((x[idx] V + b) U - ln 3)
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "ai.austeer"
VERSION = 1

MIN_ONNX_OPSET = 15
"""The function bodies need `CastLike`, which the default domain has since opset 15."""

MAX_RANK = 64
"""Largest r of the compiled kernels, `kMaxRank` in `csrc/steer.h`."""

PREFIX = "austeer"
"""First part of every name that a graft adds to a graph."""

SCALE_NAME = f"{PREFIX}.scale"
"""The initializer that all steering nodes of a model share."""

SCALE_INPUT = "steering_scale"
"""The graph input that takes its place where the strength is set at run time."""


@dataclass(frozen=True, slots=True)
class SteerOp:
    """One operator.

    Attributes:
        name: operator type in `DOMAIN`.
        tensors: its inputs that hold a site's constants, between `x` and `scale`.
    """

    name: str
    tensors: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """All input names, in order."""
        return ("x", *self.tensors, "scale")


STEER_AU = SteerOp("SteerAU", ("idx", "gamma"))
STEER_AU_ADAPTIVE = SteerOp("SteerAUAdaptive", ("idx", "gamma", "V", "b", "U"))
STEER_OPS = (STEER_AU, STEER_AU_ADAPTIVE)

_FILE_NAMES = {"idx": "index"}


def node_name(site_key: str, slot: int = 0) -> str:
    """Graph name of a site's node: `austeer.layers.{i}.{component}`.

    Nodes of a further slot have its number: `austeer.{slot}.layers.{i}.{component}`.
    """
    return f"{PREFIX}.{f'{slot}.' if slot else ''}{site_key}"


def initializer_name(site_key: str, tensor: str, slot: int = 0) -> str:
    """Graph name of a site's constant: its node's, then `.{index|gamma|V|b|U}`."""
    return f"{node_name(site_key, slot)}.{_FILE_NAMES.get(tensor, tensor)}"
