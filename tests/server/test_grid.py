"""The wrapped grid is Flower's in all that it does not change."""

from __future__ import annotations

from unittest.mock import Mock

from flwr.serverapp import Grid

from tap_flower.server.grid import StreamingGrid


def test_what_it_does_not_change_is_the_wrapped_grids() -> None:
    grid = Mock(spec=Grid, run="the run")
    grid.get_node_ids.return_value, grid.get_nodes.return_value = {7, 8}, ["node 7"]
    grid.create_message.return_value = "a message"
    wrapped = StreamingGrid(grid)
    wrapped.set_run(5)
    grid.set_run.assert_called_once_with(5)
    assert wrapped.run == "the run"
    assert wrapped.create_message("content", 7, message_type="train") == "a message"
    grid.create_message.assert_called_once_with("content", 7, message_type="train")
    assert set(wrapped.get_node_ids()) == {7, 8}
    assert list(wrapped.get_nodes()) == ["node 7"]
