"""Starts a Flower SuperNode for one client, as `tap-flower node` does."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tap_flower.errors import ConfigError
from tap_flower.run.flower import environment, flower_program, free_port


@dataclass(frozen=True)
class NodeLaunch:
    """A SuperNode to start.

    Attributes:
        spec: file of the client spec.
        superlink: address of the SuperLink, host:port.
        state_dir: folder in which the client keeps its models; Flower never sees it.
        root_certificates: PEM file of the authority that signed the SuperLink's certificate; without it, the system's.
        key: private key of the node, where the SuperLink asks for one.
        insecure: whether to connect without TLS.
        port: port of the node's own processes on this machine; without it, a free one.
        data_root: folder with a mirror of hub data sets.
        meteor: whether to compute METEOR of generated texts.
        bertscore: model of BERTScore of generated texts, or nothing.
        compile: whether to run models through torch.compile, which starts a C++ compiler.
        loader_workers: threads that read data ahead of training; None is 4 with a GPU, 0 without one.
        keep_best: whether to keep the state with the best validation scores beside the latest.
        limits: the most that the server may ask for, `KEY=N` with the keys of `client.node.Limits`.
    """

    spec: Path
    superlink: str
    state_dir: Path
    root_certificates: Path | None = None
    key: Path | None = None
    insecure: bool = False
    port: int | None = None
    data_root: Path | None = None
    meteor: bool = False
    bertscore: str = ""
    compile: bool = False
    loader_workers: int | None = None
    keep_best: bool = False
    limits: Sequence[str] = ()

    def command(self) -> list[str]:
        """The program `flower-supernode` and its arguments.

        Raises:
            ConfigError: a file is missing, a folder cannot be written, or options contradict each other.
        """
        if self.insecure and (self.root_certificates or self.key):
            raise ConfigError(
                "--insecure cannot be combined with --root-certificates or --key: leave out one or the other"
            )
        arguments = ["--insecure"] if self.insecure else []
        for option, file in (
            ("--root-certificates", self.root_certificates),
            ("--auth-supernode-private-key", self.key),
        ):
            if file is not None:
                if not file.is_file():
                    raise ConfigError(f"there is no file {file}: give another one")
                arguments += [option, str(file.resolve())]
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"state folder {self.state_dir} cannot be made: {error.strerror}") from error
        if not os.access(self.state_dir, os.W_OK):
            raise ConfigError(f"state folder {self.state_dir} cannot be written: make it writable, or give another one")
        return [
            flower_program("flower-supernode"),
            *("--superlink", self.superlink),
            *("--port", str(self.port or free_port())),
            *arguments,
            *("--node-config", self._node_config()),
        ]

    def _node_config(self) -> str:
        """The node's settings, as `tap_flower.client.node` reads them."""
        values = {"client-spec": str(self.spec.resolve()), "state-dir": str(self.state_dir.resolve())}
        if self.data_root is not None:
            values["data-root"] = str(self.data_root.resolve())
        if self.bertscore:
            values["bertscore-model"] = self.bertscore
        switches = {"meteor": self.meteor, "compile": self.compile, "keep-best": self.keep_best}
        told = [f"{name}={_quoted(value)}" for name, value in values.items()]
        told += [f"{name}=true" for name, chosen in switches.items() if chosen]
        told += [] if self.loader_workers is None else [f"loader-workers={self.loader_workers}"]
        return " ".join([*told, *(_limit(limit) for limit in self.limits)])


def start(launch: NodeLaunch) -> None:
    """Becomes the SuperNode: this process goes on as Flower's, so that signals reach it. Never returns.

    Raises:
        ConfigError: a file is missing, a folder cannot be written, or options contradict each other.
    """
    command = launch.command()
    os.execve(command[0], command, environment())


def _limit(text: str) -> str:
    """`steps=100` as the node's setting `max-steps=100`."""
    from tap_flower.client.node import Limits  # it imports Flower, which other commands do without

    key, _, value = text.partition("=")
    known = [field.name for field in fields(Limits)]
    if key not in known or not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--limit {text}: write KEY=N, with one of {', '.join(known)} and a whole number from 1 on")
    return f"max-{key.replace('_', '-')}={int(value)}"


def _quoted(value: str) -> str:
    """`value` in quotes as Flower reads them: of one kind, without any of that kind inside."""
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return json.dumps(value, ensure_ascii=False)
    raise ConfigError(f"{value} has both kinds of quotes, which Flower's --node-config cannot hold: use another path")
