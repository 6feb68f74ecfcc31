"""The setting that keeps a model's blocks off the accelerator that computes with them; this file needs no torch."""

from offsite.errors import ConfigError

AUTO, ALWAYS, NEVER = "auto", "always", "never"
SETTINGS = (AUTO, ALWAYS, NEVER)


def check_offload(setting: str, key: str = "offload") -> None:
    """Checks the setting's name.

    Raises:
      ConfigError: there is no such setting.
    """
    if setting not in SETTINGS:
        raise ConfigError(f"{key}={setting!r}: must be {AUTO}, {ALWAYS} or {NEVER}", key=key)
