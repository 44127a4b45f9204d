"""Where this installation came from, for the commands that repair it."""

import importlib.metadata
import json
import shlex
import urllib.parse
import urllib.request


def reinstall_command() -> str:
    """The command that installs this package again from where it came: a checkout (PEP 610), or the package index."""
    return f"pip install --force-reinstall --no-deps --no-cache-dir {_requirement()}"


def _requirement() -> str:
    try:
        recorded = importlib.metadata.distribution("torch-maskops").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return "."  # run from a checkout without any installation
    if not recorded:
        return "torch-maskops"
    direct = json.loads(recorded)
    parts = urllib.parse.urlsplit(direct["url"])
    source = shlex.quote(urllib.request.url2pathname(parts.path) if parts.scheme == "file" else direct["url"])
    return f"--editable {source}" if direct.get("dir_info", {}).get("editable") else source
