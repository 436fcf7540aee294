"""`python -m benchmarks.parity [--device cuda]`: a device's numbers against golden ones, and against this machine's CPU.

The golden cases (`tests/golden`) are tiny models whose outputs, losses and gradient norms an independent implementation
has computed. The device computes each task of each case twice:

* `golden`: as the published code does, in evaluation mode, against the golden numbers;
* `cpu`: as a client does, in training mode with dropout off and in evaluation mode without gradients, against the CPU in
  evaluation mode with gradients. These are different kernels of ours (`tap_flower.models.cpu`) where the device is the
  CPU, too.

In float32, without TF32, each deviation must be below LIMIT; those of bfloat16 are told, and not judged.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.measure import Row, parser, show
from tap_flower.core.components import load_trainable_state, trainable_state
from tap_flower.core.tasks import IGNORE, TASK_KINDS
from tap_flower.models.backbone import Backbone
from tap_flower.models.load import load_backbone
from tap_flower.models.lora import LoRA
from tap_flower.models.model import TapModel
from tests.golden.published import PublishedFusion, model_tasks, published_model, published_name, published_value

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "cases"
LIMIT = 1e-4
"""What a deviation in float32 must be below; see `deviation` and `relative`."""
FEWEST_GRADIENTS = 50
"""Tensors whose gradients must have been compared for each task."""
SMALLEST_NORM = 1e-5
"""A gradient with a smaller norm counts as one with this: its last digits are rounding errors of larger ones."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes:
        folder: with its files.
        expected: what its `expected.json` says.
        tensors: name -> golden value.
        inputs: name -> input, of all tasks.
    """

    folder: Path
    expected: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]

    def backbone(self) -> Backbone:
        """Its checkpoint, newly loaded: no other model shares it."""
        load_backbone.cache_clear()
        return load_backbone(str(self.folder.parent / self.expected["backbone"]), self.expected["num_layers"])

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """The trained tensors, under the published names."""
        return load_file(self.folder / "client_state.safetensors", str(device))

    def batch(self, model: TapModel, task: str, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Inputs and target of a task."""
        _, modalities, domain = next(row for row in self.expected["task_domain_pair"] if row[0] == task)
        names = [n for m in modalities for n in (("image",) if m == "image" else ("input_ids", "attention_mask"))]
        inputs: dict[str, Any] = {"domain": domain} | {name: self.inputs[name].to(device) for name in names}
        kind = model.tasks[task].kind
        if kind == "image_generation":
            return inputs, inputs["image"]
        target = self.inputs[f"labels.{task}"].to(device)
        if kind == "text_generation":
            inputs["target_length"] = target.shape[1]
            target = torch.where(target == 0, IGNORE, target)
        return inputs, target


@dataclass(frozen=True)
class Computed:
    """What a model made of a batch: its output, its mean loss, and tensor name -> gradient of that."""

    output: Tensor
    loss: Tensor
    gradients: Mapping[str, Tensor]


def main() -> None:
    """Prints a row for each task and dtype, and exits with 1 where float32 deviates."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--golden", type=Path, default=GOLDEN, help="folder of golden cases (default: the committed)")
    given = options.parse_args()
    exact_float32()
    rows = list(compare_all(given.golden, torch.device(given.device)))
    show(rows, given.json)
    if found := problems(rows):
        sys.exit("\n".join(found))


def exact_float32() -> None:
    """Has a GPU multiply float32 as float32, in convolutions too: TF32 keeps 10 of the 23 bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def cases(folder: Path) -> list[Case]:
    """All golden cases of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(path.parent for path in folder.glob("*/client_state.safetensors"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no golden case (*/client_state.safetensors): give another folder")
    return [
        Case(
            case,
            json.loads((case / "expected.json").read_text()),
            load_file(case / "expected.safetensors"),
            load_file(case / "inputs.safetensors"),
        )
        for case in found
    ]


def compare_all(folder: Path, device: torch.device) -> Iterator[Row]:
    """A row for each task of each case and dtype; see `compare`."""
    for case in cases(folder):
        yield from compare(case, device)


def compare(case: Case, device: torch.device) -> Iterator[Row]:
    """The deviations of a device's numbers in one case.

    Yields:
        For each dtype and task the deviations `golden: ...` and `cpu: ...`, see the module, and a verdict.
    """
    golden = published_model(case.backbone().to(device), case.expected, case.state(device)).to(device)
    ours, reference = own_model(case, device), own_model(case, CPU).eval()
    for dtype in (torch.float32, torch.bfloat16):
        golden.backbone.computing(dtype)
        ours.backbone.computing(dtype)
        for task in case.expected["tasks"]:
            found = golden_deviations(case, golden, task, device) | cpu_deviations(case, ours, reference, task, device)
            verdict = "told" if dtype != torch.float32 else "below" if all(map(_below, found.values())) else "NOT BELOW"
            name = str(dtype).removeprefix("torch.")
            yield {"case": case.folder.name, "task": task, "dtype": name} | found | {"limit": verdict}


def problems(rows: Iterable[Row]) -> list[str]:
    """Which deviations in float32 are not below the limit, in words."""
    return [
        f"{row['case']}: task {row['task']!r}: {name} deviates by {value:.3g} in float32, not by less than {LIMIT:g}"
        for row in rows
        if row["dtype"] == "float32"
        for name, value in row.items()
        if isinstance(value, float) and not _below(value)
    ]


def _below(value: float) -> bool:
    return value < LIMIT


def own_model(case: Case, device: torch.device) -> TapModel:
    """The model that a client has, with the golden weights and without dropout."""
    model = TapModel(case.backbone(), model_tasks(case.expected))
    state = case.state(CPU)
    load_trainable_state(model, {n: published_value(n, state, model.backbone) for n in trainable_state(model)})
    for part in model.modules():
        if isinstance(part, LoRA):
            part.dropout = 0.0
        elif isinstance(part, nn.Dropout):
            part.p = 0.0
    return model.to(device)


def golden_deviations(case: Case, model: TapModel, task: str, device: torch.device) -> dict[str, float]:
    """How far a published model on the device is from the golden tokens, features, outputs, loss and gradient norms."""
    inputs, target = case.batch(model, task, device)
    dtype, expected = model.backbone.dtype, case.expected["tasks"][task]["intended"]
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        values = {f"encoded.{m}": model.encode(m, inputs)[0] for m in model.tasks[task].pair.modalities}
        values[f"intended.features.{task}"] = model.features(task, inputs)
    fusion = model.fusion
    assert isinstance(fusion, PublishedFusion)
    parameters = {published_name(n): p for n, p in model.named_parameters() if p.requires_grad} | fusion.copy_names
    found = computed(model, parameters, task, inputs, target)
    shown = case.expected["text_positions_saved_for_intended"] if found.output.ndim == 3 else slice(None)
    values[f"intended.logits.{task}"] = found.output[:, shown]
    return {
        "golden: values": max(deviation(value, case.tensors[name]) for name, value in values.items()),
        "golden: loss": deviation(found.loss, torch.tensor(expected["loss"])),
        "golden: gradients": norm_deviation(found.gradients, expected["grad_l2"]),
    }


def cpu_deviations(
    case: Case, model: TapModel, reference: TapModel, task: str, device: torch.device
) -> dict[str, float]:
    """How far a client's model on the device is from one on the CPU, in outputs, loss and gradients."""
    batch, theirs = case.batch(model, task, device), case.batch(model, task, CPU)
    exact = computed(reference, trainable(reference), task, *theirs)
    with torch.no_grad():
        evaluated = model.eval()(task, batch[0])
    trained = computed(model.train(), trainable(model), task, *batch)
    return {
        "cpu: values": max(deviation(output, exact.output) for output in (evaluated, trained.output)),
        "cpu: loss": deviation(trained.loss, exact.loss),
        "cpu: gradients": gradient_deviation(trained.gradients, exact.gradients),
    }


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def computed(
    model: TapModel, parameters: Mapping[str, Tensor], task: str, inputs: Mapping[str, Any], target: Tensor
) -> Computed:
    """Forward and backward; no step is made. A parameter that the task does not reach has no gradient."""
    output = model(task, inputs)
    loss = TASK_KINDS[model.tasks[task].kind].losses(output, target).mean()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return Computed(output, loss, {n: g for n, g in zip(parameters, found, strict=True) if g is not None})


def deviation(value: Tensor, reference: Tensor) -> float:
    """Largest `|value - reference| / max(1, |reference|)` of any element; infinity where one is not a number."""
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    if value.shape != reference.shape:
        raise ValueError(f"a value has shape {tuple(value.shape)}, its reference {tuple(reference.shape)}")
    return _finite(float(((value - reference).abs() / reference.abs().clamp(min=1)).max()))


def gradient_deviation(gradients: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest `‖g - reference‖ / ‖reference‖` of any tensor; infinity where one has a gradient in one of the two alone."""
    if gradients.keys() != reference.keys():
        return math.inf
    _check_count(len(reference))
    found = ((gradients[name].cpu().double(), value.double()) for name, value in reference.items())
    return max(relative(float((gradient - value).norm()), float(value.norm())) for gradient, value in found)


def norm_deviation(gradients: Mapping[str, Tensor], norms: Mapping[str, float | None]) -> float:
    """Largest relative deviation of a gradient's norm; infinity where there is a gradient and should be none, or reversed.

    Args:
        gradients: published name -> gradient, of the tensors that our model holds.
        norms: published name -> golden norm, or None where the tensor is not reached.
    """
    known = {name: norm for name, norm in norms.items() if norm is not None}
    if gradients.keys() != known.keys():
        return math.inf
    _check_count(len(known))
    return max(relative(abs(float(gradients[n].double().norm()) - norm), norm) for n, norm in known.items())


def relative(difference: float, norm: float) -> float:
    """A difference over a norm, which counts as SMALLEST_NORM at least; infinity where it is not a number."""
    return _finite(difference / max(norm, SMALLEST_NORM))


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _check_count(compared: int) -> None:
    if compared < FEWEST_GRADIENTS:
        raise ValueError(f"{compared} gradients are compared, fewer than {FEWEST_GRADIENTS}: the case is not complete")


if __name__ == "__main__":
    main()
