"""Package layout only; everything else about the project stands in pyproject.toml.

`src/longshadow` is the import root, and two committed links in it, `engine` and `compress`, lead to the
top-level folders of the same names.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
LINKED = ("engine", "compress")


def package_layout() -> tuple[dict[str, str], list[str]]:
    """`package_dir` and `packages`: through the links where they are intact, otherwise mapped by hand."""
    source = ROOT / "src" / "longshadow"
    if all((source / name / "__init__.py").is_file() for name in LINKED):
        return {"": "src"}, find_packages("src")
    # An archive or a checkout without support for links leaves text files in their place.
    package_dir = {"": "src", **{f"longshadow.{name}": name for name in LINKED}}
    below = [f"{name}.{package}" for name in LINKED for package in find_packages(name)]
    return package_dir, ["longshadow", *(f"longshadow.{package}" for package in [*LINKED, *below])]


package_dir, packages = package_layout()
setup(package_dir=package_dir, packages=packages, package_data={"": ["py.typed", "*.pyi", "page.html"]})
