"""`convert`: a trained model as integer layers, a torch.export program, or ONNX, with the ranges that it was trained with.

TARGET returns the trained model and an example input, or the untrained one, whose weights and ranges --weights and --ranges then
bring. Status 1 under --check: the file's answers are not those of the deployed model.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcompile._packages import require
from qcompile.commands import target
from qcompile.deploy.integer_layer import IntegerLayer
from qcompile.wrappers import without_private_wrappers

FORMATS = {".pt": "state", ".safetensors": "state", ".pt2": "program", ".onnx": "onnx"}
"""A file's ending -> what is written."""

TOLERANCE = 0.02
"""Under --check: the share of the samples' spread by which the median of their largest differences may be off."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="package.module:function; it returns (model, inputs)")
    parser.add_argument(
        "file", metavar="FILE", type=target.output_file, help=f"what to write; its ending says what: {', '.join(FORMATS)}"
    )
    parser.add_argument("--recipe", help="what it was trained with, if not with learned scales; the inputs' ranges must be static")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="the model's state_dict (.pt, .safetensors)")
    parser.add_argument("--ranges", type=Path, metavar="FILE", help="range_state(model).state_dict() (.pt, .safetensors)")
    parser.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="sites to leave in high precision")
    parser.add_argument("--opset", type=int, default=20, help="of ONNX (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="run what was written, and compare; status 1 if it differs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from qcompile.deploy import convert
    from qcompile.state import range_state

    path: Path = arguments.file
    if path.suffix not in FORMATS:
        raise ValueError(f"FILE: got {str(path)!r}; its ending must be one of {', '.join(FORMATS)}")
    made = target.load(argparse.Namespace(target=arguments.target, autocast=None))
    if arguments.weights is not None:
        _load_weights(made.model, _read_tensors(arguments.weights), arguments.weights)
    if arguments.ranges is not None:
        range_state(made.model).load_state_dict(_read_tensors(arguments.ranges))
    made.model.eval()
    deployed = convert(made.model, *made.args, recipe=arguments.recipe, skip=arguments.skip, **made.kwargs)
    again = _WRITERS[FORMATS[path.suffix]](deployed, made, path, arguments)
    layers = [
        {
            "layer": name,
            "kind": m.described,
            "weight_bits": m.weight_bits,
            "input_bits": m.input_bits,
            "input_scale": None if m.input_scale is None else float(m.input_scale),
        }
        for name, m in deployed.named_modules()
        if isinstance(m, IntegerLayer)
    ]
    report: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size, "layers": layers}
    if arguments.check:
        report["check"] = _compare_answers(deployed, again, made)
    print(json.dumps(report, indent=2) if arguments.json else _report_text(report))
    return 1 if arguments.check and not report["check"]["same"] else 0


def _load_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """A compiled model's state too, whose names begin with a wrapper's. Errors: `ValueError` for one of another model."""
    plain = {without_private_wrappers(name): value for name, value in state.items()}
    try:
        model.load_state_dict(plain if state.keys() != model.state_dict().keys() else state)
    except RuntimeError as error:
        raise ValueError(f"--weights {path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # of several libraries, without a base in common
        raise ValueError(f"{path} is no file of tensors: {str(error) or type(error).__name__}".splitlines()[0]) from error


def _write_state(deployed: nn.Module, made: target.Target, path: Path, arguments: argparse.Namespace) -> Callable[..., Any]:
    state = deployed.state_dict()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)

    def again(*args: Any, **kwargs: Any) -> Any:
        empty = copy.deepcopy(deployed)
        for layer in (m for m in empty.modules() if isinstance(m, IntegerLayer)):
            layer.codes.zero_()
        empty.load_state_dict(_read_tensors(path))
        return empty(*args, **kwargs)

    return again


def _write_program(deployed: nn.Module, made: target.Target, path: Path, arguments: argparse.Namespace) -> Callable[..., Any]:
    from qcompile.deploy import export_program

    torch.export.save(export_program(deployed, made.args, made.kwargs), path)
    return lambda *args, **kwargs: torch.export.load(path).module()(*args, **kwargs)


def _write_onnx(deployed: nn.Module, made: target.Target, path: Path, arguments: argparse.Namespace) -> Callable[..., Any]:
    from qcompile.deploy import export_onnx

    export_onnx(deployed, made.args, path, made.kwargs, opset=arguments.opset)

    def again(*args: Any, **kwargs: Any) -> Any:
        require("--check", "onnxruntime", extra="deploy")
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        tensors = [t.numpy() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        return torch.from_numpy(session.run(None, {i.name: t for i, t in zip(session.get_inputs(), tensors, strict=True)})[0])

    return again


_WRITERS = {"state": _write_state, "program": _write_program, "onnx": _write_onnx}


def _compare_answers(deployed: nn.Module, again: Callable[..., Any], made: target.Target) -> dict[str, Any]:
    """How far what was written is from the deployed model, on the example input: by sample, in units of the outputs' spread."""
    with torch.no_grad():
        want, got = (_first_tensor(run(*made.args, **made.kwargs)) for run in (deployed, again))
    spread = float(want.std(correction=0)) or 1.0  # of one number, too
    apart = ((got - want).abs() / spread).flatten(1).amax(1) if want.ndim > 1 else (got - want).abs() / spread
    median, largest = float(apart.median()), float(apart.max())
    return {"median": median, "largest": largest, "same": median <= TOLERANCE}


def _first_tensor(outputs: Any) -> Tensor:
    found = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not found:
        raise ValueError(f"--check: the model returned a {type(outputs).__name__} without a tensor")
    return found[0].float()


def _report_text(report: dict[str, Any]) -> str:
    rows = [
        [x["layer"], x["kind"], f"int{x['weight_bits']}", f"int{x['input_bits']}" if x["input_bits"] else "hp", x["input_scale"]]
        for x in report["layers"]
    ]
    lines = [tabulate(rows, headers=["layer", "kind", "weight", "input", "scale"]), f"{report['file']}: {report['bytes']:,} bytes"]
    if "check" in report:
        check = report["check"]
        verdict = "the deployed model's answers" if check["same"] else "NOT the deployed model's answers"
        lines.append(f"{verdict}: off by {check['median']:.1e} of their spread (median), {check['largest']:.1e} at most")
    return "\n".join(lines)
