"""FedPer (Arivazhagan et al., arXiv 1912.00818): base layers are averaged, personalisation layers stay on the client.

The personalisation layers are the heads. A client trains both together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tap_flower.core.components import ComponentModel, State
from tap_flower.errors import ConfigError
from tap_flower.methods.method import Memory, Method, Participation, SecondStage
from tap_flower.methods.session import MakeUpdate, Session

NAME, OWN = "fedper", "own"


def is_base(component: str, tensor: str) -> bool:
    """Whether a tensor is exchanged: all but those of the heads are."""
    del tensor
    return not component.startswith("head/")


def check_heads(method: str, model: ComponentModel) -> None:
    """Refuses a model without heads, of which nothing would be personal.

    Raises:
        ConfigError: no component's name begins with `head/`.
    """
    if not model.component_map.heads:
        raise ConfigError(
            f"method={method} treats heads apart, and no component of the client's model is named head/...: name it, as in "
            f"Client(components={{'head/triage': 'head.*', ...}}), or use another method"
        )


def whole(received: State, memory: Memory, first: Callable[[], State]) -> State:
    """What the server sent and what the client kept, which has its first values before the client's first round."""
    return {**first(), **memory.models.get(OWN, {}), **received}


def train_whole(
    session: Session, server_round: int, received: State, memory: Memory, update: MakeUpdate | None = None
) -> Participation:
    """Trains the whole model for a round; what came from the server is returned, the rest is kept."""
    start = whole(received, memory, session.initial_values)
    trained, losses = session.train_round(server_round, start, "server", update=update)
    returned = {name: value for name, value in trained.items() if name in received}
    own = {name: value for name, value in trained.items() if name not in received}
    return Participation(returned, losses, Memory({OWN: own}))


def second_stage(session: Session, received: State, memory: Memory, name: str = NAME) -> SecondStage:
    """Fine-tunes the whole model, whose name in the results is `name`."""
    finetuned, losses = session.finetune(whole(received, memory, session.initial_values), "server")
    return SecondStage({name: finetuned}, losses)


def models(received: State, memory: Memory, first: Callable[[], State]) -> dict[str, State | None]:
    """The server's tensors with the client's own."""
    return {"personal": whole(received, memory, first)}


METHOD = Method(NAME, train_whole, second_stage, (NAME,), models, is_base, partial(check_heads, NAME))
