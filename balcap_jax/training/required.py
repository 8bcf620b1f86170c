"""What a recipe leaves to its user: paths and addresses that no file of a project can know."""

from ml_collections import ConfigDict

from balcap_jax import rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.config.groups import DATA_DIR
from balcap_jax.data.records import REWARDED


def check(config: ConfigDict) -> None:
    """Checks that data and judge are given, before anything is built. `config` is a checked one.

    Raises:
      UserError: one line with every option that is missing, and what it takes.
    """
    data, missing = config.data, []
    if data.name == "sharegpt4v" and not data.manual_dir:
        missing.append("--config.data.manual_dir=FOLDER (ShareGPT4V's JSON and the folders of pictures that it names)")
        needed = [field for field in rewards.resolve(config.rewards.name).needs if field in REWARDED]
        if needed and not data.units:  # Whether the JSON has them itself is seen once it is given.
            writer = "" if needed == ["questions"] else ", as `python -m balcap_jax.recaption` writes"
            missing.append(f"--config.data.units=FILE (lines about them with {', '.join(needed)}{writer})")
    if data.name == "photos" and data.data_dir == DATA_DIR:
        missing.append("--config.data.data_dir=FOLDER (your photographs, or a JSONL file about them)")
    if data.name == "parquet" and data.data_dir == DATA_DIR:
        missing.append("--config.data.data_dir=FILES (parquet files: one, their folder, or a glob)")
    if config.judge.name == "remote" and not config.judge.endpoints:
        missing.append("--config.judge.endpoints=URL,URL (chat servers that judge; launch/judge_server.sh starts them)")
    if missing:
        raise UserError(f"the recipe {config.name!r} leaves to you: {', '.join(missing)}")
