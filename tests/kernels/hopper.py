"""Compiles a Triton kernel for an H100, which needs no GPU: types, layouts and shared memory are checked here, times are not."""

BLOCK_SHARED = 227 * 1024  # bytes of shared memory that a block may have


def compile_for_hopper(kernel, kinds: dict[str, str], fixed: dict, **options):
    """kinds: the type of each argument that is not int32, and of `fixed`'s names none. Pointers, and the widths that
    the callers pass, are multiples of 16, as the launcher would find."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names}
    even = ("width", "columns", "b_expert", "b_row")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n in even}
    source = triton.compiler.ASTSource(kernel, signature, {n: v for n, v in fixed.items() if n in names}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= BLOCK_SHARED
    return made
