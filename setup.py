"""Maps the root folders to moiety.*; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ["compose", "routers", "experts", "analysis"]

mapped = find_packages(include=[glob for folder in FOLDERS for glob in (folder, f"{folder}.*")])

setup(
    include_package_data=False,
    packages=[
        *find_packages(include=["moiety", "moiety.*"]),
        *(f"moiety.{package}" for package in mapped),
    ],
    package_dir={"moiety": "moiety", **{f"moiety.{folder}": folder for folder in FOLDERS}},
    package_data={"moiety": ["py.typed"], "moiety.analysis": ["templates/*"]},
)
