"""Model families behind one interface (`policy.Policy`), and loading and saving them."""

from balcap_jax.models.formats.loading import build, load, read_fields
from balcap_jax.models.formats.saving import save
from balcap_jax.models.policy import Policy, Prompt

__all__ = ["Policy", "Prompt", "build", "load", "read_fields", "save"]
