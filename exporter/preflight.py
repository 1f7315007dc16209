"""What a run's products would be refused for, found before the fit is paid for."""

from __future__ import annotations

from austeer.adapters.model_directory import model_directory
from austeer.adapters.weights import Checkpoint
from austeer.exporter.checkpoint import check_companions
from austeer.exporter.free_space import check_space, run_size
from austeer.exporter.merge import read_model_config, refuse_quantized
from austeer.exporter.peft_export import check_peft_base
from austeer.exporter.products import Base
from austeer.exporter.routes import Route
from austeer.exporter.settings import RunOptions


def check_files(options: RunOptions) -> None:
    """Check the base's files, and the space for what will be written; loads no model.

    Raises:
        ModelError: no such base, or files that cannot be copied.
        RouteError: a product that cannot be made of weights like these.
        OutputError: not enough free space.
    """
    folder = model_directory(options.base.model, options.base.revision)
    routes = set(options.routes)
    if routes - {Route.ONNX}:
        refuse_quantized(
            folder, "fit the unquantized model, then merge the adapter into this one"
        )
    copied = routes & {Route.SAFETENSORS, Route.CODE}
    if copied:
        check_companions(Checkpoint(folder))
    if Route.CODE in routes:
        from austeer.exporter.code_export import check_code_base

        check_code_base(folder, read_model_config(folder))
    size = run_size(options.routes, folder, options.max_units, options.base.dtype)
    check_space(options.out, size, Checkpoint(folder).files if copied else ())


def check_model(base: Base, options: RunOptions) -> None:
    """Check that the routes can take the model that was loaded, and the components chosen.

    Raises:
        RouteError: one cannot.
    """
    if Route.ONNX in options.routes:
        from austeer.exporter.onnx_export import check_exportable

        check_exportable(base.model)
    for route in options.routes:
        check_peft_base(base.folder, route, options.candidates)
