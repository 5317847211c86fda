"""Public names of a package, each found in its module on first use, so that importing the package loads nothing heavy."""

from collections.abc import Callable
from importlib import import_module


def lazily(package: str, names: dict[str, str]) -> tuple[Callable, Callable]:
    """Return `__getattr__` and `__dir__` for a package whose names are found in modules, {name: module}.

    A name that its module does not define means the module itself, as does one of the package's own modules.
    """

    def find(name: str):
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; `dir({package})` lists what it has")
        module = import_module(names[name])
        return module if names[name] == f"{package}.{name}" else getattr(module, name, module)

    return find, lambda: sorted(names)
