"""A model on disk: `model.json` (family and sizes), `params/` (Orbax) and the tokenizer's own files."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from balcap_jax.errors import UserError
from balcap_jax.models import llava
from balcap_jax.models.llava.processing import LlavaProcessor
from balcap_jax.models.policy import Params, Policy

FAMILIES = {"llava": llava.build}


def build(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Policy, LlavaProcessor]:
    """Policy and processor of the config group `model`; parameters come from `policy.init` or from `load`."""
    return FAMILIES[model["family"]](model, tokenizer)


def save(path: str | os.PathLike, model: Mapping[str, Any], params: Params, processor: LlavaProcessor) -> Path:
    """Writes a model directory that `load` reads; an existing one is replaced only once the new one is complete."""
    path = Path(path).absolute()
    aside = path.with_name(path.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(aside / "params", jax.tree.map(np.asarray, params))
        processor.tokenizer.save_pretrained(aside)
        fields = {name: value for name, value in dict(model).items() if name != "path"}
        (aside / "model.json").write_text(json.dumps(fields | {"template": processor.template}, indent=2) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        # On a full disk tokenizers raises a bare Exception, and TensorStore
        # ValueError("STATUS: what: file: cause [details]").
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].partition(" [")[0]
        raise UserError(f"cannot write the model to {path}: {reason}; make room there") from error
    return path


def load(path_or_name: str | os.PathLike, **overrides: Any) -> tuple[Policy, Params, LlavaProcessor]:
    """Loads a model directory written by `save`.

    Args:
      path_or_name: the directory.
      overrides: fields of the config group `model` to change, for example dtype="bfloat16" or prompt_tokens=64.

    Returns:
      (policy, fp32 parameters, processor).

    Raises:
      UserError: the directory is missing or no model, or an override changes a parameter's shape.
    """
    path = Path(path_or_name).absolute()
    fields = read_fields(path)
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise UserError(f"unknown model field {unknown[0]!r}; the model at {path} has {', '.join(sorted(fields))}")
    fields |= overrides
    try:
        build_family = FAMILIES[fields["family"]]
        tokenizer = AutoTokenizer.from_pretrained(path)
        policy, processor = build_family(fields, tokenizer, fields["template"])
    except KeyError as error:
        if fields.get("family") in {None, *FAMILIES}:
            raise UserError(f"the model at {path} lacks the field {error} in model.json; save it again") from error
        known = ", ".join(FAMILIES)
        raise UserError(f"the model at {path} is of the unknown family {error}; there is {known}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer at {path} cannot be read: {str(error).splitlines()[0]}") from error
    like = jax.eval_shape(policy.init, jax.random.key(0))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / "params", like)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"the parameters at {path}/params cannot be read: {str(error).splitlines()[0]}") from error
    # Orbax hands out what is stored, whatever shape was asked for.
    for (where, wanted), found in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(params), strict=True):
        if wanted.shape != found.shape:
            name = jax.tree_util.keystr(where, simple=True, separator="/")
            raise UserError(
                f"the parameters at {path}/params do not fit its fields: {name} is {found.shape}, {wanted.shape} is "
                f"needed; leave out overrides of sizes"
            )
    return policy, params, processor


def read_fields(path_or_name: str | os.PathLike) -> dict[str, Any]:
    """The config group `model` of a saved model, with its prompt template under "template".

    Raises:
      UserError: the directory is missing or no model.
    """
    path = Path(path_or_name).absolute()
    try:
        fields = json.loads((path / "model.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no model at {path}: model.json is missing; give a directory that training wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the model at {path} cannot be read: model.json is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"the model at {path} cannot be read: model.json is no JSON object")
    return fields
