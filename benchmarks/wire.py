"""`python -m benchmarks.wire [--json FILE]`: bytes and errors of a client's round in each encoding, at full size.

The clients are the two-task ones of the paper's pattern 7. Their messages are made as in a run and counted as Flower sends
them: values, scales, names, headers. They are compared with the model's whole state_dict, frozen weights included, and
with what the method's published code sends in each direction for such a FLAVA client.

Values are made up like trained ones: every tensor starts as in a run; `down` it has moved by DOWN (rms) since, `up` by UP
in a participation (20 steps of AdamW at 3e-4 move a value by 6e-3 at most); both times normal, with rows of different
sizes (log-normal). Errors are what the encoding takes from the server's values and from the client's differences, in the
values' own units; the client adds its own to its next difference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from torch import Tensor

from benchmarks.measure import Row, parser, show
from benchmarks.workload import configuration
from tap_flower.client.from_spec import client_model
from tap_flower.config import Config, Encoding, client_specs, load_config, sent_hyper_parameters
from tap_flower.core.components import trainable_state
from tap_flower.core.seeds import named_seed
from tap_flower.models.load import from_config
from tap_flower.models.model import TapModel
from tap_flower.wire import messages
from tap_flower.wire.messages import Epoch, Instruction, Report
from tap_flower.wire.tensors import encode_tensors, make_update, moved_from, moved_to

PATTERN = 7
PUBLISHED = 1528e6
"""Bytes in each direction."""
DOWN, UP, SPREAD = 6e-3, 2e-3, 0.5
"""Rms of what values have moved by; standard deviation of the logarithm of a row's size."""


def main() -> None:
    """Prints a row for each kind of component, and one for the whole message."""
    given = parser(__doc__).parse_args()
    rows = [row for preset in ("flava", "vilt") for row in measure(preset)]
    show(rows, given.json)


def measure(preset: str) -> list[Row]:
    """The rows of one preset's client."""
    config = load_config(preset)
    model = outline(preset, config)
    state_dict = sum(tensor.nbytes for tensor in model.state_dict().values())
    component_of = model.component_map.component_of
    shapes = trainable_state(model)
    initial = {n: model.initials[n].value(n, tuple(shape.shape), config.seed) for n, shape in shapes.items()}
    values = {name: value + step(value, DOWN, name, "down") for name, value in initial.items()}
    rows: list[Row] = []
    for encoding in Encoding:
        config.wire.encoding = encoding
        sent = moved_from(values, initial, encoding)
        down = messages.encode(
            Instruction(
                run="0" * 32,
                epochs=(Epoch("0" * 32, 0),),
                round=1,
                hyper_parameters=sent_hyper_parameters(config),
            ),
            encode_tensors(sent, encoding),
            config=ConfigRecord({"server-round": 1}),
        )
        arrived = messages.tensors_of(down, encoding)
        received = moved_to(arrived, initial, encoding)
        trained = {name: value + step(value, UP, name, "up") for name, value in received.items()}
        difference, _ = make_update(received, trained, {}, encoding)
        tasks = dict.fromkeys(model.tasks, 1)
        up = messages.encode(
            Report(round=1, examples=tasks, losses=dict.fromkeys(tasks, math.pi), steps=1, replacements=tasks),
            encode_tensors(difference, encoding),
            metrics=MetricRecord({"num-examples": len(tasks), "train-loss": math.pi}),
        )
        returned = messages.tensors_of(up, encoding)
        errors = {
            "down": {name: arrived[name] - value for name, value in sent.items()},
            "up": {name: returned[name] - value for name, value in difference.items()},
        }
        counted = {"down": messages.payload_bytes(down), "up": messages.payload_bytes(up)}
        groups = defaultdict[str, list[str]](list)
        for name, component in component_of.items():
            groups[group(component)].append(name)
        for title, names in sorted(groups.items()):
            sizes = {way: sum(found[name] for name in names) for way, found in counted.items()}
            rows.append(_row(preset, encoding, title, sizes, {}, errors, names))
        whole = {"down": on_the_wire(down), "up": on_the_wire(up)}
        ratios = {"state_dict": state_dict / max(whole.values())}
        if preset == "flava":
            ratios["published"] = PUBLISHED / max(whole.values())
        rows.append(_row(preset, encoding, "whole message", whole, ratios, errors, list(received)))
    return rows


def outline(preset: str, config: Config) -> TapModel:
    """The client's model at full size, without values."""
    with torch.device("meta"):
        backbone = from_config(configuration(preset, "base"), config.model.layers, config.model.image_size)
        return client_model(backbone, client_specs(config)[PATTERN], config.model.text_length)


def step(value: Tensor, rms: float, *names: object) -> Tensor:
    """How far training has moved a value, see above."""
    random = torch.Generator().manual_seed(named_seed(0, *names))
    rows = torch.randn(value.shape[:1], generator=random).mul_(SPREAD).exp_()
    size = rms / math.exp(SPREAD**2)  # the rms of exp(SPREAD · normal) is exp(SPREAD²)
    return torch.randn(value.shape, generator=random) * size * rows.view(-1, *[1] * (value.ndim - 1))


def group(component: str) -> str:
    """The kind of a component: an encoder each, the fusion, the heads."""
    kind = component.partition("/")[0]
    return {"encoder": component, "head": "head"}.get(kind, "fusion")


def on_the_wire(content: RecordDict) -> int:
    """Bytes of a message's content as Flower sends it."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def _row(
    preset: str,
    encoding: Encoding,
    component: str,
    sizes: Mapping[str, int],
    ratios: Mapping[str, float],
    errors: Mapping[str, Mapping[str, Tensor]],
    names: Iterable[str],
) -> Row:
    found = {way: torch.cat([by_name[name].reshape(-1) for name in names]) for way, by_name in errors.items()}
    return {
        "client": preset,
        "encoding": encoding.value,
        "component": component,
        "MB down": sizes["down"] / 1e6,
        "MB up": sizes["up"] / 1e6,
        "state_dict": ratios.get("state_dict", ""),
        "1528 MB": ratios.get("published", ""),
        "down: max": float(found["down"].abs().max()),
        "rms": float(found["down"].square().mean().sqrt()),
        "up: max": float(found["up"].abs().max()),
        "rms ": float(found["up"].square().mean().sqrt()),
    }


if __name__ == "__main__":
    main()
