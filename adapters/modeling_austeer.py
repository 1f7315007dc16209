"""A causal language model that rescales a few of its activation units; transformers ≥ 4.57.

austeer (AUSteer, arXiv 2602.04428) copies this file beside the weights of a steered model,
where it needs torch and transformers only. The class of the base model is extended, its
weights stay as they are. At each site of config.json's `steering` a hook rescales the k
selected units x of one activation, token by token:

    x̂ = gain ⊙ x,    gain = 1 + scale · γ · φ

φ is 1, or what a small predictor makes of the same token's x:

    φ = 4 · sigmoid(t U − ln 3),    t = x V + b
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

FORMAT_VERSION = 1
BANK = "austeer"
_PARALLEL = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


class SteeredConfig(PretrainedConfig):  # type: ignore[misc]
    """Entry point of AutoConfig: gives the base model's config, saved under another type.

    transformers does not know that type, so that no file of ours loads without its steering.
    """

    model_type = "austeer_steered"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The base model's config, extended.

        Raises:
            ValueError: no `steering`, one of another format, or an unknown base.
        """
        base_type = _base_type(config_dict)
        values = {**config_dict, "model_type": base_type}
        return _config_class(base_type).from_dict(values, **kwargs)


class Steer(nn.Module):
    """The steered units of one site; its numbers stay in float32 whatever the model is cast to.

    Args:
        module: path of the module at which the activation is read and rescaled.
        side: `input` or `output` of that module.
        units: number of units k.
        rank: rank r of the predictor, 0 for constant gains.
        config: the model's, whose `steering_scale` is the factor on γ.

    Raises:
        ValueError: another side.
    """

    def __init__(self, module: str, side: str, units: int, rank: int, config: Any) -> None:
        super().__init__()
        if side not in ("input", "output"):
            raise ValueError(f"config.json: steering of {module}: unknown side {side!r}")
        self.module, self.side, self.rank = module, side, rank
        self._config = config
        self.register_buffer("index", torch.zeros(units, dtype=torch.int64))
        shapes: dict[str, tuple[int, ...]] = {"gamma": (units,)}
        if rank:
            shapes |= {"V": (units, rank), "b": (rank,), "U": (rank, units)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    def steer(self, x: Tensor) -> Tensor:
        """Rescale the selected units of x [..., width] in float32, rounded once at the end."""
        # The model may be spread over several devices.
        index = self.get_buffer("index").to(x.device)
        selected = x.index_select(-1, index).float()
        gain = 1.0 + self._amount(selected)
        return x.index_copy(-1, index, (selected * gain).to(x.dtype))

    def _amount(self, selected: Tensor) -> Tensor:
        """The product scale · γ · φ for the selected activations [..., k]."""
        there = selected.device
        amount = float(self._config.steering_scale) * self.get_buffer("gamma").to(there)
        if not self.rank:
            return amount
        V, b, U = (self.get_buffer(name).to(there) for name in "VbU")
        return amount * (4.0 * torch.sigmoid((selected @ V + b) @ U - math.log(3.0)))

    # Methods of a module, and not of closures: a deep copy of a hooked model binds them anew.
    def on_input(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook: steers the first argument."""
        return (self.steer(args[0]), *args[1:])

    def on_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: steers the output, or the first of several."""
        if isinstance(output, tuple):
            return (self.steer(output[0]), *output[1:])
        return self.steer(output)

    def attach(self, model: nn.Module) -> None:
        """Hook into `model`."""
        module = model.get_submodule(self.module)
        if self.side == "input":
            module.register_forward_pre_hook(self.on_input)
        else:
            # In front of the hooks of transformers that collect hidden states.
            module.register_forward_hook(self.on_output, prepend=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Steer:
        """Let .to() and .half() move the numbers, never round them."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self


class SteeredForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """The base model's own class with steered units; see the top of this file.

    `steering_scale` is the factor on every γ: 0 is the base model, 1 the steering as exported.
    """

    config_class = SteeredConfig
    native_class: Any = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is SteeredForCausalLM:
            raise TypeError("SteeredForCausalLM: load it with AutoModelForCausalLM")
        super().__init__(config, *args, **kwargs)
        sites = config.steering["sites"]
        if not sites:
            raise ValueError("config.json: steering has no sites; fetch the model again")
        config.steering_scale = _finite(getattr(config, "steering_scale", 1.0))
        steers = {key: Steer(**facts, config=config) for key, facts in sites.items()}
        # In the inner model, whose prefix a checkpoint's names have or lack all together.
        decoder = self.get_submodule(self._decoder_name)
        setattr(decoder, BANK, _nested(steers))
        self.attach_steering()
        decoder.register_forward_pre_hook(self._keep_attached)

    @property
    def steering_scale(self) -> float:
        """Factor on every γ; saved with the model."""
        return float(self.config.steering_scale)

    @steering_scale.setter
    def steering_scale(self, value: float) -> None:
        self.config.steering_scale = _finite(value)
        for steer in self._steers():
            steer._config = self.config

    def attach_steering(self) -> None:
        """Hook the steering in, also where a module was replaced or wrapped since.

        A forward pass does so itself, unless it is compiled.
        """
        for module in self.modules():
            # One of before stays behind on what a wrapper holds inside.
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                ours = [k for k, h in hooks.items() if isinstance(_owner(h), Steer)]
                for key in ours:
                    del hooks[key]
        self._hooked = []
        for steer in self._steers():
            steer.attach(self)
            path, _, name = steer.module.rpartition(".")
            parent = self.get_submodule(path)
            self._hooked.append((parent, name, parent.get_submodule(name)))

    def _keep_attached(self, *_: Any) -> None:
        """Forward pre-hook: what peft wraps or unwraps takes its hooks along, or loses them."""
        if torch.compiler.is_compiling():
            return
        if any(parent.get_submodule(name) is not m for parent, name, m in self._hooked):
            self.attach_steering()

    @property
    def _decoder_name(self) -> str:
        """First part of every site's path; a class's `base_model_prefix` may be another."""
        first = next(iter(self.config.steering["sites"].values()))
        return str(first["module"].partition(".")[0])

    def _steers(self) -> Iterator[Steer]:
        bank = self.get_submodule(f"{self._decoder_name}.{BANK}")
        return (module for module in bank.modules() if isinstance(module, Steer))

    @classmethod
    def from_pretrained(
        cls, name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load as transformers does; `config` comes from AutoConfig or SteeredConfig.

        Raises:
            ValueError: no such config, steering tensors that are missing or were rounded, or
                tensor parallelism, which splits the activations whose units are numbered.
        """
        if cls is SteeredForCausalLM:
            extended = _model_class(config)
            return extended.from_pretrained(name_or_path, *args, config=config, **kwargs)
        for name in _PARALLEL:
            if kwargs.get(name) is not None:
                raise ValueError(f"steered model: {name} is not supported; use device_map")
        if renamed := _stored_names(cls.native_class):
            kwargs["key_mapping"] = renamed | (kwargs.get("key_mapping") or {})
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        _check_numbers(model, info["missing_keys"], info["unexpected_keys"])
        # Quantization on the fly replaces modules after they were hooked.
        model.attach_steering()
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if cls is SteeredForCausalLM:
            return _model_class(config)._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)


def _finite(scale: float) -> float:
    """The factor on every γ.

    Raises:
        ValueError: it is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"steering_scale: expected a finite number, got {scale}")
    return float(scale)


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def _base_type(config: Mapping[str, Any]) -> str:
    """Model type of the base.

    Raises:
        ValueError: no steering, another format, or a base that transformers does not know.
    """
    steering = config.get("steering")
    version = steering.get("format_version") if isinstance(steering, Mapping) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f"config.json: steering format_version {version!r}, this code reads "
            f"{FORMAT_VERSION}; take the modelling file that belongs to the weights"
        )
    base = str(config["steering"].get("base_model_type"))
    if base not in CONFIG_MAPPING:
        raise ValueError(f"config.json: unknown base_model_type {base!r}; update transformers")
    return base


@lru_cache
def _config_class(base_type: str) -> Any:
    """The base's config class; named as the class that stands for it.

    In memory it keeps the base's model type, which libraries ask for.
    """
    native: Any = CONFIG_MAPPING[base_type]
    saved = {"model_type": SteeredConfig.model_type}
    body = {
        "to_dict": lambda self: native.to_dict(self) | saved,
        "to_diff_dict": lambda self: native.to_diff_dict(self) | saved,
        # Libraries load a config by the class of the one in memory.
        "from_pretrained": classmethod(
            lambda _, *a, **k: SteeredConfig.from_pretrained(*a, **k)
        ),
        "_auto_class": "AutoConfig",
        "__module__": __name__,
    }
    return type(SteeredConfig.__name__, (native,), body)


def _model_class(config: Any) -> Any:
    """The extended model class for a config that SteeredConfig gave.

    Raises:
        ValueError: any other config.
    """
    if not isinstance(config, PretrainedConfig):
        raise ValueError("steered model: expected a config of SteeredConfig.from_pretrained")
    return _extended_model(_base_type(vars(config)))


@lru_cache
def _extended_model(base_type: str) -> Any:
    native = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base_type]]
    body = {
        "config_class": _config_class(base_type),
        "native_class": native,
        "__module__": __name__,
    }
    return type(SteeredForCausalLM.__name__, (SteeredForCausalLM, native), body)


def _stored_names(native: Any) -> dict[str, str]:
    """Patterns by which transformers 5 renames stored tensors of the base's own class.

    It looks them up by the class's name, which is another here.

    Raises:
        ValueError: one that is more than a new name.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers 4 has none
        return {}
    found: dict[str, str] = {}
    for change in get_checkpoint_conversion_mapping(native.__name__) or ():
        sources, targets = change.source_patterns, change.target_patterns
        if type(change).__name__ != "WeightRenaming" or len(sources) != 1 or len(targets) != 1:
            raise ValueError(
                f"steered model: {native.__name__} converts its weights on loading"
            )
        found[sources[0]] = targets[0]
    return found


def _check_numbers(model: nn.Module, missing: Any, unexpected: Any) -> None:
    """Refuse a loaded model whose steering transformers left out or rounded; it only warns.

    Raises:
        ValueError: names the tensor.
    """
    for name in unexpected:
        if BANK in name.split("."):
            raise ValueError(
                f"steered model: config.json has no site for {name}; fetch it again"
            )
    for name, tensor in model.named_buffers():
        if BANK not in name.split("."):
            continue
        if name in missing:
            raise ValueError(f"steered model: {name} is not in the weights; fetch them again")
        wanted = torch.int64 if name.endswith(".index") else torch.float32
        if tensor.dtype != wanted:
            raise ValueError(
                f"steered model: {name} was loaded as {tensor.dtype}, expected {wanted}; "
                "load the model without quantization"
            )


def _nested(steers: Mapping[str, Steer]) -> nn.ModuleDict:
    """A tree of modules, so that `layers.0.ffn` is a prefix of tensor names."""
    tree = nn.ModuleDict()
    for key, steer in steers.items():
        *groups, name = key.split(".")
        node: Any = tree
        for group in groups:
            if group not in node:
                node[group] = nn.ModuleDict()
            node = node[group]
        node[name] = steer
    return tree


# So that save_pretrained writes this file again, however the model was loaded.
SteeredConfig.register_for_auto_class("AutoConfig")
SteeredForCausalLM.register_for_auto_class("AutoModelForCausalLM")
