"""Lists the packages for setuptools. Everything else about the build is in pyproject.toml.

Three packages lie beside their parent: ``algorithms/`` installs as ``posttrain.algorithms``, and so on. The
links in ``posttrain/`` serve type checkers and a checkout that is not installed. The build does not use them,
because a ZIP of the tree, or a checkout with ``core.symlinks=false``, holds text files in their place.
"""

from setuptools import find_namespace_packages, setup

BESIDE = ("algorithms", "rewards", "recipes")
CACHES = ("__pycache__", "*.__pycache__")

links = [pattern for name in BESIDE for pattern in (f"posttrain.{name}", f"posttrain.{name}.*")]
packages = find_namespace_packages(include=["posttrain", "posttrain.*"], exclude=[*links, *CACHES])
for name in BESIDE:
    inner = find_namespace_packages(name, exclude=CACHES)
    packages += [f"posttrain.{name}", *(f"posttrain.{name}.{package}" for package in inner)]

setup(packages=packages, package_dir={f"posttrain.{name}": name for name in BESIDE})
