"""FedDAT (Chen et al., AAAI 2024, arXiv 2308.12305): the server's copy and a personal teacher distil into each other.

In the paper each layer has three adapters: the server's A_c, which is trained and returned; a frozen copy Â_c of it as
it came; a local A_s, which stays on the client. The dual-adapter teacher answers with the mean of Â_c and A_s. On each batch

* A_c minimises `L(z_c) + w · KL(z_DAT → z_c)`,
* A_s minimises `L(z_DAT) + w · KL(z_c → z_DAT)`,

each with the other's answers z as constants: mutual distillation, at temperature T, by the divergence of the kind of task.

How this differs from the paper. An adapter is everything that a client trains and exchanges, heads included, as clients
here share those of a task; experts of a pair are shared by the pair's holders alone, in the teacher as everywhere. The
teacher has the mean of the *weights*, `θ_DAT = ½ θ_s + ½ θ̂_c`, in place of the mean of the adapters' outputs in each
layer, so that it is a model of the client's own form, which can be kept and exported. For a LoRA pair the two differ by `¼
(B_s − B̂_c)(A_s − Â_c)`, of second order in what the adapters differ by; so that this is small, A_s starts as what the
client receives first.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from tap_flower.core.components import State, cpu_state
from tap_flower.core.training import Batch
from tap_flower.methods.method import Memory, Method, Participation, SecondStage
from tap_flower.methods.mixture import LOCAL, OWN_LOOP, Mixture, mixed_models, mixture
from tap_flower.methods.session import Session

NAME, HALF = "feddat", 0.5


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """R optimiser steps of the server's copy, and beside each one of the teacher."""
    settings, optimisation = session.settings.baselines, session.settings.train.optimisation(server_round)
    weight, temperature = settings.feddat_weight, settings.feddat_temperature
    frozen = {name: value.to(session.device, copy=True) for name, value in received.items()}
    teacher = Mixture(session, memory.models.get(LOCAL, received), frozen, HALF, optimisation)

    def mutual(batch: Batch, output: Tensor) -> Tensor:
        def apart(student: Tensor, other: Tensor) -> Tensor:
            units = session.kinds[batch.task].divergences(student, other, batch.target, temperature)
            return weight * units.mean()

        constant = output.detach()
        return apart(output, teacher.backward(batch, lambda answer: apart(answer, constant)))

    def update(number: int, optimizer: Optimizer) -> None:
        del number
        optimizer.step()
        teacher.step()
        teacher.mix()

    copy, order, noise = session.model(received), (server_round,), (server_round, "server")
    losses = session.train(copy, optimisation, order=order, noise=noise, objective=mutual, update=update)
    return Participation(cpu_state(copy), losses, teacher.kept())


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes the teacher with the last server's adapter."""
    finetuned, losses = session.finetune(mixture(received, memory), "personal")
    return SecondStage({NAME: finetuned}, losses)


METHOD = Method(NAME, participate, second_stage, (NAME,), mixed_models, own_loop=OWN_LOOP, trained=lambda _: (2, 1))
