"""What is set on a node, and never comes from the server: its client, its folders, metrics that read files, a compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from tap_flower.config import Metrics, read_yaml, simulated_clients, simulated_run
from tap_flower.data.spec import ClientSpec, client_spec
from tap_flower.errors import ConfigError, SpecError


@dataclass(frozen=True)
class Node:
    """A node's own settings.

    Attributes:
        spec: of its client.
        state_dir: folder for the states of the node's client, as STATE_DIR/CLIENT/RUN.
        folder: in a simulation, folder of the client's state, in place of STATE_DIR/CLIENT/RUN.
        data_root: folder with a mirror of the hub's data sets, or nothing.
        metrics: which further metrics it computes.
        compile: whether it runs its models through torch.compile.
    """

    spec: ClientSpec
    state_dir: Path | None
    folder: Path | None
    data_root: str
    metrics: Metrics
    compile: bool = False


def this_node(context: Context) -> Node:
    """The settings of the node that runs this: from its `--node-config`, or in a simulation from the run's configuration.

    Args:
        context: Flower's.

    Raises:
        ConfigError: a simulation has more nodes than clients.
        SpecError: the node lacks a setting, or one is wrong.
    """
    node = context.node_config
    if "client-spec" in node:
        if "state-dir" not in node:
            raise SpecError('the node has a client-spec but no state-dir: add state-dir="FOLDER" to its --node-config')
        spec = client_spec(read_yaml(Path(str(node["client-spec"])), "client spec"))
        metrics = Metrics(_switch(node, "meteor"), str(node.get("bertscore-model", "")))
        data_root = str(node.get("data-root", ""))
        return Node(spec, Path(str(node["state-dir"])), None, data_root, metrics, _switch(node, "compile"))
    if "partition-id" not in node:
        raise SpecError(
            'the node has no client-spec: start it with --node-config \'client-spec="FILE" state-dir="FOLDER"\''
        )
    config, out = simulated_run(context.run_config, context.run_id)
    specs, partition = simulated_clients(context.run_config), int(node["partition-id"])
    if partition >= len(specs):
        raise ConfigError(
            f"there are more nodes than the {len(specs)} clients of preset {config.preset!r}: "
            f"use num-supernodes={len(specs)}"
        )
    spec, compiled = specs[partition], config.compute.compile
    return Node(spec, None, out / "clients" / spec.name, config.data.root, config.metrics, compiled)


def _switch(node: Mapping[str, object], name: str) -> bool:
    value = node.get(name, False)
    if not isinstance(value, bool):
        raise SpecError(f"the node's {name} is {value!r}: write {name}=true or {name}=false in its --node-config")
    return value
