"""The version of what is installed, without loading more of the package than its name."""

from __future__ import annotations

from importlib import metadata


def installed_version() -> str:
    """Of this package; empty in a checkout that was not installed."""
    try:
        return metadata.version("jetflow-cluster")
    except metadata.PackageNotFoundError:
        return ""
