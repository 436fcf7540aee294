"""Who is missing, and whose state was lost: a run says so, and fails where it has nothing to go on with."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from flwr.app import Error, Message

from tap_flower.client.state import PERSONAL
from tap_flower.errors import RunError
from tap_flower.files import read_tensors
from tap_flower.report.events import read_events
from tap_flower.report.results import remarks
from tap_flower.server import attendance
from tap_flower.server import grid as grids
from tap_flower.server.grid import StreamingGrid
from tap_flower.wire import messages
from tap_flower.wire.messages import EVALUATE, MANIFEST, PERSONALISE, TRAIN, VALUES
from tests.federations import Make, ToyFederation
from tests.grid import InProcessGrid, round_of
from tests.toys import TOYS

Tamper = Callable[[Message, Message], Message | None]


def at(message_type: str, server_round: int, happen: Callable[[], Any], node: int | None = None) -> Tamper:
    """Something that happens once, when the first reply of a phase is there (that of a node, if given)."""
    happened: list[bool] = []

    def tamper(message: Message, reply: Message) -> Message:
        of_node = node in (None, message.metadata.dst_node_id)
        if (
            message.metadata.message_type == message_type
            and round_of(message) == server_round
            and of_node
            and not happened
        ):
            happened.append(True)
            happen()
        return reply

    return tamper


def crash() -> None:
    raise KeyboardInterrupt


def crashed(federation: ToyFederation, message_type: str = TRAIN, server_round: int = 2) -> None:
    """Runs until the server dies."""
    with pytest.raises(KeyboardInterrupt):
        federation.strategy().start(federation.grid(tamper=at(message_type, server_round, crash)))


def events(federation: ToyFederation, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(federation.out) if event["event"] == name]


def summary(federation: ToyFederation) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((federation.out / "results.json").read_text())
    return found


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, 0.0
        self._then: list[tuple[float, Callable[[], Any]]] = []

    def then(self, seconds: float, happen: Callable[[], Any]) -> None:
        """Has something happen so many seconds from now."""
        self._then.append((self.now + seconds, happen))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        due = [happen for when, happen in self._then if when <= self.now]
        self._then = [(when, happen) for when, happen in self._then if when > self.now]
        for happen in due:
            happen()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (grids, attendance):
        monkeypatch.setattr(module.time, "monotonic", found.monotonic)
        monkeypatch.setattr(module.time, "sleep", found.sleep)
    return found


# --- absent clients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
def test_a_resumed_run_without_a_client_says_who_is_missing_and_why(
    make_federation: Make, clock: Clock, private: bool, caplog: pytest.LogCaptureFixture
) -> None:
    budget = ["privacy.epsilon=100", "privacy.max_noise=100", "rounds=3"] if private else ["rounds=3"]
    federation = make_federation(TOYS, *budget)
    crashed(federation)
    grid = federation.grid()
    del grid.contexts[102]
    result = federation.strategy(resume=True).start(grid)
    reason = "it has not come back within 1 s after the run was resumed"
    assert result.missing == summary(federation)["missing"] == {"cleo": reason}
    assert f"Not in the results: cleo: {reason}" in caplog.text
    assert result.clients.keys() == {"ann", "bob", "dan"}
    assert events(federation, "start")[-1]["missing"] == ["cleo"]
    assert ("privacy" in result.summary) == private


def test_a_resumed_run_waits_for_the_clients_that_it_knows(make_federation: Make, clock: Clock) -> None:
    federation = make_federation(TOYS, "start_timeout=60")
    crashed(federation)
    grid = federation.grid()
    late = grid.contexts.pop(102)
    clock.then(30, lambda: grid.contexts.update({102: late}))
    result = federation.strategy(resume=True).start(grid)
    assert (result.missing, result.marks) == ({}, {})
    assert events(federation, "start")[-1]["missing"] == []
    assert 30 <= clock.slept < 60


def test_a_client_that_leaves_is_missing_for_that_reason(federation: ToyFederation, clock: Clock) -> None:
    grid = federation.grid()
    grid.tamper = at(TRAIN, 2, lambda: grid.contexts.pop(103), node=103)
    result = federation.strategy().start(grid)
    assert result.missing == {"dan": "its node has gone"}


# --- states that were lost ---------------------------------------------------------------------------------------------

LOST = "it had no state of this run after it had taken part in round 2"


def lose(federation: ToyFederation, client: str = "ann") -> None:
    shutil.rmtree(federation.out / "clients" / client)


@pytest.mark.parametrize(
    ("phase", "marks"),
    [
        (PERSONALISE, [LOST]),
        (EVALUATE, [LOST, "at the evaluation it had lost what stage 2 had made: server+finetune, tap"]),
    ],
    ids=["before stage 2", "after stage 2"],
)
def test_a_state_that_was_lost_marks_the_metrics(federation: ToyFederation, phase: str, marks: list[str]) -> None:
    class Losing(InProcessGrid):
        lost = False

        def answer(self, message: Message) -> Message:
            if message.metadata.message_type == phase and message.metadata.dst_node_id == 100 and not self.lost:
                lose(federation)
                self.lost = True
            return super().answer(message)

    node = federation.grid()
    grid = Losing([dict(c.node_config) for c in node.contexts.values()], {}, node.app)
    result = federation.strategy().start(grid)
    assert result.marks == summary(federation)["marks"] == {"ann": marks}
    assert [(e["client"], e["problem"]) for e in events(federation, "mark")] == [("ann", mark) for mark in marks]


def test_a_state_that_was_lost_before_a_resume_is_marked(federation: ToyFederation) -> None:
    crashed(federation, PERSONALISE)
    lose(federation)
    assert federation.strategy(resume=True).start(federation.grid()).marks == {"ann": [LOST]}


def test_a_state_that_was_lost_stops_a_run_that_requires_it(make_federation: Make) -> None:
    federation = make_federation(TOYS, "require_state=true")
    crashed(federation, PERSONALISE)
    lose(federation)
    with pytest.raises(RunError, match=f"client 'ann': {LOST}: restore its state folder"):
        federation.strategy(resume=True).start(federation.grid())


def test_a_client_that_has_not_personalised_is_marked(federation: ToyFederation, clock: Clock) -> None:
    result = federation.strategy().start(hanging(federation, (101, PERSONALISE)))
    reason = "no answer in time (raise the timeout, or look at the node)"
    assert result.marks == {"bob": [f"stage 2 was not done: {reason}"]}
    assert "tap" not in result.clients["bob"]["languages"]
    assert "tap" in result.clients["ann"]["languages"]


def test_a_repeated_round_takes_nothing_from_the_history_that_is_void(make_federation: Make, clock: Clock) -> None:
    """In the repeated round bob's reply is lost: as in a run in which nothing else has happened."""

    def lost(message: Message, reply: Message) -> Message | None:
        bobs = message.metadata.message_type == TRAIN and message.metadata.dst_node_id == 101
        return None if bobs and round_of(message) == 2 else reply

    settings = ("rounds=3", "round_timeout=1")
    expected = make_federation(TOYS, *settings)
    expected.strategy().start(expected.grid(tamper=lost))
    federation = make_federation(TOYS, *settings)
    with pytest.raises(KeyboardInterrupt):  # all have trained in round 2, and kept what they have
        federation.strategy().start(federation.grid(tamper=at(TRAIN, 2, crash, node=103)))
    federation.strategy(resume=True).start(federation.grid(tamper=lost))
    assert summary(federation)["clients"] == summary(expected)["clients"]
    for name in ("ann", "bob", "cleo", "dan"):
        ours, theirs = (read_tensors(f.state(name) / PERSONAL)[0] for f in (federation, expected))
        assert all(bool((ours[tensor] == theirs[tensor]).all()) for tensor in theirs)


# --- a crash in round 1 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("phase", [MANIFEST, TRAIN])
def test_after_a_crash_before_round_1_is_complete_a_run_is_resumed_or_begun_anew(
    make_federation: Make, resume: bool, phase: str
) -> None:
    whole, federation = make_federation(), make_federation()
    crashed(federation, phase, 1 if phase == TRAIN else 0)
    if not resume:
        federation.settings.append("seed=41")  # a new run may have another configuration
        whole.settings.append("seed=41")
    result = federation.strategy(resume=resume).start(federation.grid())
    expected = whole.strategy().start(whole.grid())
    assert result.clients == expected.clients
    assert (result.missing, result.marks) == ({}, {})


# --- replies -----------------------------------------------------------------------------------------------------------


def failing(phase: str, nodes: Iterable[int] = (100, 101, 102, 103)) -> Tamper:
    def lose_it(message: Message, reply: Message) -> Message | None:
        hit = message.metadata.message_type == phase and message.metadata.dst_node_id in nodes
        return Message(messages.encode(messages.Evaluation({})), reply_to=message) if hit else reply

    return lose_it


@pytest.mark.parametrize(
    ("phase", "named"), [(TRAIN, "round 1"), (PERSONALISE, "stage 2"), (EVALUATE, "the evaluation")]
)
def test_a_phase_without_a_usable_reply_fails_with_the_reasons(
    federation: ToyFederation, phase: str, named: str
) -> None:
    problem = (
        f"{named}: 0 of 4 clients have given a usable answer, min_replies is 1: client '.*; .*; .* and 1 more; fix"
    )
    with pytest.raises(RunError, match=problem):
        federation.strategy().start(federation.grid(tamper=failing(phase)))
    assert not (federation.out / "results.json").exists()
    assert events(federation, "failed")[0]["type"] == "RunError"


def test_the_fewest_replies_are_an_option(make_federation: Make) -> None:
    federation = make_federation(TOYS, "min_replies=3")
    with pytest.raises(
        RunError, match="1: 2 of 4 clients have given a usable answer, min_replies is 3: client 'bob': .*client 'ann': "
    ):
        federation.strategy().start(federation.grid(tamper=failing(TRAIN, (100, 101))))


def test_stage_2_counts_the_clients_of_both_times(make_federation: Make) -> None:
    federation = make_federation(TOYS, "min_replies=4")
    with pytest.raises(
        RunError, match="stage 2: 3 of 4 clients have given a usable answer, min_replies is 4: .*--resume"
    ):
        federation.strategy().start(federation.grid(tamper=failing(PERSONALISE, [101])))


def test_an_evaluation_is_asked_again(federation: ToyFederation) -> None:
    broken = failing(EVALUATE, [101])
    times = itertools.count()

    def once(message: Message, reply: Message) -> Message | None:
        changed = broken(message, reply)
        return changed if changed is reply or next(times) == 0 else reply

    result = federation.strategy().start(federation.grid(tamper=once))
    assert (result.missing, result.clients.keys()) == ({}, {"ann", "bob", "cleo", "dan"})


# --- nodes that are refused, hang or are slow --------------------------------------------------------------------------


class Hanging(InProcessGrid):
    """Some nodes take what they are sent, and never answer it."""

    def __init__(self, *arguments: Any, hung: Iterable[tuple[int, str]] = ()) -> None:
        super().__init__(*arguments)
        self.hung = set(hung)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        def hangs(message_id: str) -> bool:
            asked = self._waiting[message_id].metadata
            return (asked.dst_node_id, asked.message_type) in self.hung

        return super().pull_messages([i for i in message_ids if i in self._waiting and not hangs(i)])


def hanging(federation: ToyFederation, *hung: tuple[int, str], nodes: int = 4) -> Hanging:
    return Hanging([{"partition-id": i} for i in range(nodes)], {}, federation.grid().app, hung=hung)


def asked(grid: InProcessGrid, message_type: str, node: int) -> int:
    return sum((m.metadata.message_type, m.metadata.dst_node_id) == (message_type, node) for m in grid.sent)


def test_a_node_that_hangs_from_the_start_costs_no_time_and_is_asked_once(make_federation: Make, clock: Clock) -> None:
    federation = make_federation([*TOYS, TOYS[0]], "rounds=5", "clients_per_round=4", "round_timeout=3600")
    grid = hanging(federation, (104, MANIFEST), nodes=5)
    result = federation.strategy().start(grid)
    assert result.clients.keys() == {"ann", "bob", "cleo", "dan"}
    assert asked(grid, MANIFEST, 104) == 1
    assert clock.slept < 60


def test_a_resumed_run_does_not_wait_for_a_stranger_that_hangs(make_federation: Make, clock: Clock) -> None:
    federation = make_federation([*TOYS, TOYS[0]], "clients_per_round=4", "start_timeout=600")
    crashed(federation)
    before = clock.slept
    grid = hanging(federation, (104, MANIFEST), nodes=5)
    assert federation.strategy(resume=True).start(grid).missing == {}
    assert clock.slept - before < 60


def test_one_problem_of_many_nodes_is_said_once(make_federation: Make) -> None:
    federation = make_federation([TOYS[0]] * 30)

    def fail(message: Message, _: Message) -> Message:
        return Message(Error(7, "no backbone"), reply_to=message)

    with pytest.raises(RunError, match=r"^node 100 and 29 more cannot take part: no backbone \(Flower's error 7\)$"):
        federation.strategy().start(federation.grid(tamper=fail))
    assert len(events(federation, "dropped")) == 30  # each in the events


def test_a_refused_node_is_asked_once(make_federation: Make) -> None:
    federation = make_federation([*TOYS, TOYS[0]], "rounds=5", "clients_per_round=4")
    grid = federation.grid()
    result = federation.strategy().start(grid)
    assert asked(grid, MANIFEST, 104) == 1
    # Whoever reads the results learns that a node's client is not in them.
    (reason,) = (problem for who, problem in result.missing.items() if who == "node 104")
    assert remarks(summary(federation)) == [f"node 104 was not evaluated: {reason}"]
    assert [e["who"] for e in events(federation, "dropped")] == ["node 104"]


def test_a_refused_node_is_asked_again_once_it_has_gone_and_come_back(make_federation: Make) -> None:
    federation = make_federation([*TOYS, TOYS[0]], "rounds=4", "clients_per_round=4")
    grid = federation.grid()
    gone: list[Any] = []
    leave = at(TRAIN, 1, lambda: gone.append(grid.contexts.pop(104)))
    back = at(TRAIN, 2, lambda: grid.contexts.update({104: gone.pop()}))
    grid.tamper = lambda message, reply: back(message, leave(message, reply) or reply)
    federation.strategy().start(grid)
    assert asked(grid, MANIFEST, 104) == 2


def test_a_client_that_hangs_is_waited_for_once(make_federation: Make, clock: Clock) -> None:
    federation = make_federation(TOYS, "rounds=5", "round_timeout=3600", "start_timeout=10")
    grid = hanging(federation, *((102, kind) for kind in (TRAIN, PERSONALISE, EVALUATE)))
    answers = grid.hung
    grid.tamper = at(TRAIN, 1, lambda: answers.add((102, MANIFEST)))
    result = federation.strategy().start(grid)
    assert asked(grid, TRAIN, 102) == 1
    assert 3600 < clock.slept < 2 * 3600
    assert list(result.missing) == ["cleo"]
    assert result.missing["cleo"].startswith("no answer in time")


def test_a_client_that_comes_in_a_long_round_takes_part_in_the_next(make_federation: Make, clock: Clock) -> None:
    federation = make_federation(TOYS, "rounds=2", "round_timeout=100", "clients_per_round=4")
    grid, strategy = hanging(federation, (102, TRAIN)), federation.strategy()
    strategy.min_available_nodes = 3
    late = grid.contexts.pop(103)
    clock.then(50, lambda: grid.contexts.update({103: late}))
    strategy.start(grid)
    assert [e["clients"] for e in events(federation, "round_start")] == [
        ["ann", "bob", "cleo"],
        ["ann", "bob", "cleo", "dan"],
    ]
    # cleo joins again, having answered who she is.
    assert [(e["round"], e["client"]) for e in events(federation, "joined")][:2] == [(1, "cleo"), (1, "dan")]


def test_a_client_that_answers_again_takes_part_again(make_federation: Make, clock: Clock) -> None:
    federation = make_federation(TOYS, "rounds=4", "round_timeout=3600")
    grid = hanging(federation, (102, TRAIN))
    grid.tamper = at(TRAIN, 2, grid.hung.clear)
    result = federation.strategy().start(grid)
    rounds = [sorted(e["clients"]) for e in events(federation, "round")]
    assert ["cleo" in names for names in rounds] == [False, True, True, True]
    assert result.missing == {}


def test_the_clock_starts_again_with_every_answer(federation: ToyFederation, clock: Clock) -> None:
    """Four clients share one process: each takes 40 of 60 seconds, and all are heard."""

    class Queue(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            waiting = [i for i in message_ids if i in self._waiting]
            if not waiting or self._waiting[waiting[0]].metadata.message_type in (MANIFEST, VALUES):
                return super().pull_messages(waiting)
            started = self.__dict__.setdefault("started", {})
            if clock.now - started.setdefault(waiting[0], clock.now) < 40:
                return []
            return super().pull_messages(waiting[:1])

    grid = Queue([{"partition-id": i} for i in range(4)], {}, federation.grid().app)
    result = federation.strategy().start(grid)
    assert (result.missing, result.marks) == ({}, {})
    assert events(federation, "dropped") == []
    assert clock.slept > 4 * 4 * 40


def test_a_message_lives_as_long_as_those_before_it_may_take(federation: ToyFederation) -> None:
    grid = federation.grid()
    federation.strategy().start(grid)
    lives = [m.metadata.ttl for m in grid.sent if m.metadata.message_type == TRAIN and round_of(m) == 1]
    assert lives == [60.0, 120.0, 180.0, 240.0]


def test_a_message_to_a_node_that_has_gone_is_named_as_that(federation: ToyFederation, clock: Clock) -> None:
    class Gone(InProcessGrid):
        def push_messages(self, asked: Iterable[Message]) -> Iterable[str]:
            (message,) = asked
            if (message.metadata.message_type, message.metadata.dst_node_id) == (TRAIN, 101):
                self.contexts.pop(101, None)
                return [""]
            return super().push_messages([message])

    grid = Gone([{"partition-id": i} for i in range(4)], {}, federation.grid().app)
    result = federation.strategy().start(grid)
    reason = "the node has gone: the SuperLink does not know it any more"
    assert result.missing == {"bob": reason}
    assert [(e["who"], e["problem"]) for e in events(federation, "dropped")] == [("client 'bob'", reason)]


def test_a_grid_waits_as_long_as_the_messages_live_where_no_timeout_is_given(clock: Clock) -> None:
    grid = Hanging([{}], {}, hung=[(100, TRAIN)])
    sent: Iterator[Message] = iter([Message(messages.RecordDict(), 100, TRAIN, ttl=30.0)])
    (reply,) = StreamingGrid(grid).send_and_receive(sent)
    assert reply.error.code == grids.SILENT
    assert 30 < clock.slept < 35
