"""Which library a layer or a weight comes from, told without importing that library."""


def comes_from(thing: object, package: str) -> bool:
    """Whether a class of the thing is defined in the package, such as `torchao` or `optimum.quanto`."""
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in type(thing).__mro__)
