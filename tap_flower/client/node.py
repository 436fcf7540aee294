"""What is set on a node, and never comes from the server: its client, its folders, the metrics that read files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from tap_flower.config import ConfigError, Metrics, read_yaml
from tap_flower.data.spec import ClientSpec, client_spec
from tap_flower.errors import SpecError
from tap_flower.wire.run_config import simulated_clients, simulated_run


@dataclass(frozen=True)
class Node:
    """A node's own settings.

    Attributes:
        spec: of its client.
        folder: of the client's state in this run.
        data_root: folder with a mirror of the hub's data sets, or nothing.
        metrics: which further metrics it computes.
    """

    spec: ClientSpec
    folder: Path
    data_root: str
    metrics: Metrics


def this_node(context: Context, run: str) -> Node:
    """The settings of the node that runs this: from its `--node-config`, or in a simulation from the run's configuration.

    Args:
        context: Flower's.
        run: identity of the run. A node keeps the states of its runs apart, as STATE-DIR/CLIENT/RUN.

    Raises:
        ConfigError: a simulation has more nodes than clients.
        SpecError: the node lacks a setting, or one is wrong.
    """
    node = context.node_config
    if "client-spec" in node:
        if "state-dir" not in node:
            raise SpecError('the node has a client-spec but no state-dir: add state-dir="FOLDER" to its --node-config')
        spec = client_spec(read_yaml(Path(str(node["client-spec"])), "client spec"))
        folder = Path(str(node["state-dir"])) / spec.name / run
        return Node(spec, folder, str(node.get("data-root", "")), _metrics(node))
    if "partition-id" not in node:
        raise SpecError(
            'the node has no client-spec: start it with --node-config \'client-spec="FILE" state-dir="FOLDER"\''
        )
    config, out = simulated_run(context)
    specs, partition = simulated_clients(context), int(node["partition-id"])
    if partition >= len(specs):
        raise ConfigError(
            f"there are more nodes than the {len(specs)} clients of preset {config.preset!r}: "
            f"use num-supernodes={len(specs)}"
        )
    return Node(specs[partition], out / "clients" / specs[partition].name, config.data.root, config.metrics)


def _metrics(node: Mapping[str, object]) -> Metrics:
    meteor, bertscore = node.get("meteor", False), node.get("bertscore-model", "")
    if not isinstance(meteor, bool):
        raise SpecError(f"the node's meteor is {meteor!r}: write meteor=true or meteor=false in its --node-config")
    return Metrics(meteor, str(bertscore))
