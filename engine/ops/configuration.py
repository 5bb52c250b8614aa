"""How a Triton kernel is shipped, so that it can be compiled ahead of time, without a GPU."""

from typing import Any, NamedTuple

# A program's shared memory on compute capability 8.6 and 8.9, the least of the supported devices.
SHARED_MEMORY = 99 * 1024
POINTER_ALIGNMENT = 16


class Configuration(NamedTuple):
    """One kernel with everything it is compiled for.

    Attributes:
        name: unique among the operator's configurations.
        kernel: the `triton.jit` function.
        signature: types of its run-time parameters, "*fp16", "i32", "fp32", in their order; pointers are aligned.
        constexprs: values of its `tl.constexpr` parameters.
        minimum_capability: the earliest device it compiles for, 89 where it reads fp8.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    minimum_capability: int = 80


def compile_ahead_of_time(configuration: Configuration, capability: int) -> Any:
    """Triton's compiled kernel (`.asm["ptx"]`, `.asm["cubin"]`, `.metadata.shared`) for `capability`, 80 or later.

    The process must not have imported triton with TRITON_INTERPRET=1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = configuration.kernel
    types = {name: configuration.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (position,): [["tt.divisibility", POINTER_ALIGNMENT]]
        for position, type_name in enumerate(types.values())
        if type_name.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=configuration.constexprs, attrs=aligned)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
