from balcap_jax.config.recipes import default_config

__all__ = ["default_config"]
