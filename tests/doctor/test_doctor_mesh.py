"""What `doctor` says of a mesh where nobody has named the devices: what no number of them makes fit is a fault."""

import pytest
from doctor.set_up import assert_fault

from balcap_jax.doctor import __main__ as doctor
from balcap_jax.doctor import devices
from balcap_jax.doctor.findings import UNCHECKED

NAME = "name the slice with --topology, such as v5e:4x4; it takes minutes"


MESHES = {
    "fsdp of no batch": ({"fsdp": 3}, "stages.rl.batch_size is 2, which does not", "change the mesh.* sizes, or the"),
    "all that is left": ({"data": -1, "fsdp": 3}, "does not divide over 3 devices", "change the mesh.* sizes, or the"),
    "replicas": ({"replica": 4}, "does not divide over 4 devices", "change the mesh.* sizes, or the batch size"),
    "tensor of no axis": ({"tensor": 7}, "mesh.tensor = 7 does not divide an axis of size ", "another mesh.tensor"),
    "sampling": ({"tensor": 2, "sampling": 3}, "mesh.sampling is 3, and mesh.tensor (2) does not", "set it to auto"),
    "sampling, closed": ({"tensor": 2, "fsdp": 1, "sampling": 4}, "mesh.sampling is 4, but on", "set it to one of"),
    "parts": ({"fsdp": 2}, "rollout.parts is 2: 2 prompts over 2 devices", "set it to one of these, or to auto"),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_that_no_devices_make_fit(sound, built, name):
    sizes, found, remedy = MESHES[name]
    more = {"rollout__parts": 2} if name == "parts" else {}
    config = sound.config(**{f"mesh__{axis}": size for axis, size in sizes.items()}, **more)
    assert_fault(devices.mesh(config, built.params), "devices", found, remedy)


def test_what_is_not_known_of_a_mesh_is_said(sound, built, tmp_path, capsys):
    assert devices.mesh(sound.config(), built.params).found == NAME
    finding = devices.mesh(sound.config(mesh__data=-1, mesh__fsdp=2), built.params)
    assert finding.verdict == UNCHECKED
    what = "the mesh (data what is left x fsdp 2) divides the batches and the parameters; not looked at: "
    assert finding.found == f"{what}the devices that mesh.data takes, their number, their memory; {NAME}"
    unknown = devices.mesh(sound.config(mesh__tensor=7), None)
    assert (unknown.verdict, " divides the batches; not" in unknown.found) == (UNCHECKED, True)
    doctor.main(sound.command(tmp_path / "run", **{"mesh.data": -1, "mesh.fsdp": 2}))
    output, errors = capsys.readouterr()
    last = "for the devices: without --topology neither their number nor their memory was held against the mesh"
    assert (output.splitlines()[-1], errors) == (f"ready, but {last}", "")
