"""What each kernel takes of a Hopper multiprocessor: `python -m vfl_train.kernels.vision_kv.resources`.

Compiles every configuration of `configs` for sm_90 with the installed triton, no GPU needed, and prints a
table: registers a thread (at most 255; 65536 a multiprocessor), shared memory a program (at most 227 KiB),
bytes of stack a thread (spilled registers), how many instructions spill inside an innermost loop, and whether
the products run on the matrix units (HGMMA, or HMMA for small tiles; FFMA in float32). Arguments choose the
lines that contain all of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vfl_train.kernels.vision_kv.configs import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    COMBINE_WARPS,
    FORWARD,
    Config,
)
from vfl_train.kernels.vision_kv.triton_path import _compiled, _kernels

CAPABILITY = 90
MOST_REGISTERS, MOST_SHARED = 255, 227 * 1024
FLOATS = {2: "bf16", 4: "fp32"}
TABLES = ("tiles", "queries", "chunks", "keys", "bounds", "readers")
FLOAT32 = ("LSE", "DELTA", "PART", "PART_LSE")


class Variant(NamedTuple):
    """One kernel to compile."""

    kernel: str
    itemsize: int
    width: int  # D
    config: Config
    flags: tuple[tuple[str, bool], ...]

    @property
    def name(self) -> str:
        """In a table."""
        flags = "".join(f" {name.lower()}" for name, on in self.flags if on)
        return f"{self.kernel}{flags} {FLOATS[self.itemsize]} D={self.width}"


class Resources(NamedTuple):
    """What the compiled kernel takes; `instruction`: of its matrix products."""

    registers: int
    shared: int  # bytes
    stack: int  # bytes
    spills: int  # instructions
    instruction: str
    seconds: float


def variants() -> Iterator[Variant]:
    """All configurations at their full width, and the largest 16-bit tile at widths in between."""
    for (itemsize, width), options in FORWARD.items():
        for config in options:
            yield Variant("forward", itemsize, width, config, (("SPLIT", False),))
        yield Variant("forward", itemsize, width, options[-1], (("SPLIT", True),))
    for width, config in ((80, FORWARD[2, 128][-1]), (96, FORWARD[2, 128][-1])):
        yield Variant("forward", 2, width, config, (("SPLIT", False),))
    for width in (64, 128, 256):
        config = FORWARD[2, width][-1]._replace(warps=COMBINE_WARPS, stages=1)
        yield Variant("combine", 2, width, config, ())
    for (itemsize, width), config in BACKWARD_QUERIES.items():
        yield Variant("backward_queries", itemsize, width, config, ())
    for (itemsize, width), config in BACKWARD_KEYS.items():
        for causal in (False, True) if itemsize == 2 else (True,):
            yield Variant("backward_keys", itemsize, width, config, (("CAUSAL", causal),))


def compile_variant(variant: Variant, groups: int = 7) -> Any:
    """triton's compiled kernel, for `groups` query heads a key head."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = _kernels()
    if not kernels.COMPILED:
        raise RuntimeError("the kernels were imported under TRITON_INTERPRET=1, which compiles nothing")
    fn = getattr(kernels, variant.kernel)
    known = {
        "G": groups, "D": variant.width, "BLOCK_M": variant.config.block_m, "BLOCK_N": variant.config.block_n,
        "BLOCK_D": 1 << (variant.width - 1).bit_length(), "UPCAST": False, **dict(variant.flags),
    }  # fmt: skip
    constants = {name: known[name] for name in fn.arg_names if name in known}
    signature = {n: "constexpr" if n in constants else _type_of(n, variant) for n in fn.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if signature[name].startswith("*") or re.fullmatch(r"[a-z]+_[nrht]", name)
    }
    source = ASTSource(
        fn, signature, {(fn.arg_names.index(name),): value for name, value in constants.items()}, aligned
    )
    options = _compiled(variant.config.warps, variant.config.stages)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)


def _type_of(name: str, variant: Variant) -> str:
    if name in TABLES:
        return "*i32"
    if name in FLOAT32:
        return "*fp32"
    if name in ("factor", "scale"):
        return "fp32"
    if name in ("H", "S", "M", "splits", "length") or "_" in name:  # sizes, strides
        return "i32"
    return f"*{FLOATS[variant.itemsize]}"


def measure(variant: Variant) -> Resources:
    """Compile and look into the binary."""
    start = time.perf_counter()
    compiled = compile_variant(variant)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    used = Counter(re.findall(r"\b(HGMMA|HMMA|FFMA)\b", code))
    instruction = next((name for name in ("HGMMA", "HMMA", "FFMA") if used[name]), "")
    shared = max(compiled.metadata.shared, found["SHARED"])
    stack = found["STACK"] + found["LOCAL"]
    return Resources(found["REG"], shared, stack, spills_in_loops(code), instruction, seconds)


def spills_in_loops(code: str) -> int:
    """Loads and stores of spilled registers within innermost loops, of disassembled `code`."""
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    jumps = [(int(m[1], 16), at) for at, what in lines if (m := re.search(r"\bBRA.* 0x([0-9a-f]+)", what))]
    loops = [(start, end) for start, end in jumps if start < end]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    spills = [at for at, what in lines if re.search(r"\b(STL|LDL)\b", what)]
    return sum(start <= at <= end for at in spills for start, end in inner)


def _cuobjdump(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def line(variant: Variant, found: Resources) -> str:
    """One line of the table, in Markdown."""
    c = variant.config
    sizes = f"{c.block_m} x {c.block_n}" if variant.kernel != "combine" else f"{c.block_m}"
    return (
        f"| {variant.name} | {sizes} | {c.warps} | {c.stages} | {found.registers} "
        f"| {found.shared / 1024:.0f} | {found.stack} | {found.spills} | {found.instruction} |"
    )


HEAD = """\
| kernel | M x N | warps | stages | registers | shared, KiB | stack, bytes | spills in loops | products |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> int:
    """Exit code 1: something does not fit."""
    import triton

    print(f"triton {triton.__version__}, sm_{CAPABILITY}, 7 query heads a key head\n\n{HEAD}")
    fits = True
    for variant in variants():
        if not all(word in f"{variant.name} {variant.config}" for word in sys.argv[1:]):
            continue
        found = measure(variant)
        fits &= found.registers <= MOST_REGISTERS and found.shared <= MOST_SHARED
        print(line(variant, found), flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
