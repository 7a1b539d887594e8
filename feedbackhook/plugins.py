"""Import what other packages add: rules, datasets, networks, conditions, procedures and published errors."""

from __future__ import annotations

from importlib.metadata import entry_points

GROUP = "feedbackhook"
"""The group of entry points that name modules to import."""


class PluginError(ImportError):
    """A plugin cannot be imported; the message names it and its package."""


def load() -> None:
    """Import the module of each entry point of `GROUP`, which registers what it has.

    Raises:
        PluginError: one of them cannot be imported.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except (ImportError, AttributeError) as error:
            package = f" of the package {point.dist.name}" if point.dist else ""
            raise PluginError(
                f"the plugin {point.name!r} ({point.value}){package} cannot be imported: {error}. Repair or "
                "uninstall that package"
            ) from error
