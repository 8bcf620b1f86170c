"""Runs a training command beside a stand-in for the module wandb, offline and without a network.

    python with_wandb.py LOG FAILS_AT <arguments of balcap_jax.train>

LOG gets one JSON line for each call. The call `log` of step FAILS_AT raises what wandb's service does when it is gone.
"""

import json
import sys
import types
from pathlib import Path


def stand_in(path: Path, fails_at: int) -> types.ModuleType:
    def note(**entry) -> None:
        with path.open("a") as file:
            file.write(json.dumps(entry, default=str) + "\n")

    class Run:
        def log(self, values: dict, step: int) -> None:
            if step == fails_at:
                raise ConnectionError("the service\nis gone")
            note(call="log", step=step, values=values)

        def finish(self) -> None:
            note(call="finish")

    class Table(dict):
        def __init__(self, columns: list, data: list):
            assert all(len(row) == len(columns) for row in data)
            super().__init__(columns=columns, data=data)

    def image(picture) -> dict:
        return {"size": list(picture.size), "mode": picture.mode, "first": list(picture.getpixel((0, 0)))}

    def init(**settings) -> Run:
        note(call="init", **settings)
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.Table, module.Image = init, Table, image
    return module


if __name__ == "__main__":
    sys.modules["wandb"] = stand_in(Path(sys.argv[1]), int(sys.argv[2]))
    from balcap_jax import train

    train.main(sys.argv[3:])
