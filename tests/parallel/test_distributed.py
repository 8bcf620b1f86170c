"""What tells a process which one it is, and the rows of a batch on a mesh."""

import socket

import jax
import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.parallel import distributed, sharding
from balcap_jax.parallel.host_batch import Rows, take

GIVEN = {"BALCAP_COORDINATOR": "host:1234", "BALCAP_PROCESS_COUNT": "4", "BALCAP_PROCESS_ID": "3"}


def test_environment():
    assert distributed.read_environment({}) is None
    assert distributed.read_environment({"BALCAP_DISTRIBUTED": "0"}) is None
    assert distributed.read_environment({"BALCAP_DISTRIBUTED": "1"}) == {}
    assert distributed.read_environment(GIVEN) == {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"BALCAP_PROCESS_ID": ""}, "BALCAP_COORDINATOR is set, but not BALCAP_PROCESS_ID; set all three of"),
        ({"BALCAP_PROCESS_ID": "4"}, "BALCAP_PROCESS_ID is 4, but BALCAP_PROCESS_COUNT 4; ids count from 0"),
        ({"BALCAP_PROCESS_COUNT": "all"}, "BALCAP_PROCESS_COUNT is 'all'; give a number"),
        ({"BALCAP_COORDINATOR": "host"}, "BALCAP_COORDINATOR is 'host'; give host:port of process 0"),
    ],
)
def test_environment_that_makes_no_sense(changes, expected):
    with pytest.raises(UserError) as error:
        distributed.read_environment(GIVEN | changes)
    assert expected in str(error.value)


def test_port_that_is_taken():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be used on .*; give all processes another one"):
            distributed.check_port(f"localhost:{port}")
    distributed.check_port(f"localhost:{port}")


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4)])
def test_rows_go_to_the_mesh_and_come_back(sizes):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    rows = Rows(mesh, 16)
    batch = {"x": np.arange(48).reshape(16, 3), "y": np.arange(16) % 3 == 0}
    placed = rows.put(batch)
    assert placed["x"].sharding == sharding.batch_sharding(mesh)
    for name, array in rows.fetch(placed).items():
        np.testing.assert_array_equal(array, batch[name])
    # What a program hands out need not be laid out as a batch.
    other = jax.device_put(batch["x"], sharding.replicated(mesh))
    np.testing.assert_array_equal(rows.fetch(other), batch["x"])
    assert list(rows.held[rows.own]) == list(range(16)), "one process judges every row once"


def test_rows_of_columns():
    columns = {"id": ["a", "b", "c"], "x": np.arange(6).reshape(3, 2)}
    taken = take(columns, np.array([2, 0]))
    assert taken["id"] == ["c", "a"]
    np.testing.assert_array_equal(taken["x"], [[4, 5], [0, 1]])
