"""Weighted binary criteria about a scene, in RubiCap's form: one for each unit of its reference."""

from balcap_jax.data.scenes import language
from balcap_jax.data.scenes.reading import claim_from_unit
from balcap_jax.data.scenes.world import Scene

STATES = "states that "  # what each criterion begins with; a unit of the reference follows
# By the kind of a unit: 3 critical, 2 important, 1 minor, as the writer of rubrics for photographs has it.
WEIGHTS = {"object": 3, "count": 2, "place": 2, "ground": 2, "size": 1, "texture": 1, "pattern": 1, "relation": 1}


def rubrics(scene: Scene) -> list[dict]:
    """[{"criterion": text, "weight": 1 to 3}], in the order of `language.reference_units`."""
    units = language.reference_units(scene)
    return [{"criterion": f"{STATES}{unit}", "weight": WEIGHTS[claim_from_unit(unit).kind]} for unit in units]


def unit_of(criterion: str) -> str | None:
    """The unit that a criterion of a scene is about; None for any other text."""
    return criterion.removeprefix(STATES) if criterion.startswith(STATES) else None
