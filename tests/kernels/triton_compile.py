"""What the Triton backend would launch, recorded without a GPU, and compiled for real for any architecture."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import adajudge_kernels as ak
from adajudge_kernels.experts import triton as experts
from adajudge_kernels.loss import triton as loss
from adajudge_kernels.pooling import triton as pooling
from adajudge_kernels.refinement import triton as refinement
from tests import machine_code

TRITON_VERSION = triton.__version__
NVIDIA = {arch: GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a block may use

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
DIVISIBLE = "i32, divisible by 16"
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments, its constants and its options: what a compilation depends on."""

    kernel: JITFunction
    signature: tuple
    constants: tuple
    options: tuple

    @property
    def name(self):
        return self.kernel.fn.__name__.removeprefix("_")


@contextmanager
def recorded_launches():
    """Collect the distinct launches made in the block instead of running them."""
    found = {}

    def launcher(kernel, grid):
        def record(*args, **kwargs):
            options = tuple((k, kwargs.pop(k)) for k in _OPTIONS if k in kwargs)
            signature = tuple(_type(x, parameter) for x, parameter in zip(args, kernel.params, strict=False))
            launch = Launch(kernel, signature, tuple(kwargs.items()), options)
            found[launch] = launch

        return record

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield found


def _type(x, parameter):
    """As triton specialises: an int that 16 divides is known to be such, unless the kernel does not want it."""
    if isinstance(x, tuple):
        return tuple(_type(y, parameter) for y in x)
    if isinstance(x, torch.Tensor):
        return _POINTERS[x.dtype]
    if isinstance(x, float):
        return "fp32"
    return DIVISIBLE if x % 16 == 0 and not parameter.do_not_specialize else "i32"


@dataclass(frozen=True)
class Compiled:
    """What a compilation came to."""

    registers: int
    stack: int  # bytes per thread; 0 means that nothing was spilled
    shared: int  # bytes per block
    assembly: str
    cubin: bytes = field(default=b"", repr=False)

    @property
    def sixteen_byte_loads(self):
        """How many load instructions of the PTX fetch 16 bytes a thread, to registers or to shared memory."""
        to_registers = r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|ld\.global\S*\.v4\.f32"
        to_shared = r"cp\.async\.cg\.\S+ \[[^]]*\], \[[^]]*\], 0x10"
        return len(re.findall(f"{to_registers}|{to_shared}", self.assembly))

    @property
    def fused_exponents(self):
        """How many exponentials of the PTX are of the result of one fused multiply-add."""
        fused = set(re.findall(r"fma\.rn\.f32\s+(%\w+),", self.assembly))
        return sum(x in fused for x in re.findall(r"ex2\.approx\S*\s+%\w+, (%\w+);", self.assembly))

    @property
    def tensor_core_products(self):
        """How many matrix instructions the PTX has."""
        return len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", self.assembly))

    @property
    def loops(self):
        """The machine code's loops: the names of their instructions."""
        kernel = machine_code.instructions(machine_code.dump(self.cubin, "-sass"))
        return [[x.name for x in kernel[loop]] for loop in machine_code.loops(kernel)]

    @property
    def loop(self):
        """The longest of them."""
        return max(self.loops, key=len)


def compile_launch(launch, target):
    """The compilation of a launch for a target; pointers lie on 16-byte boundaries, as the launcher makes sure."""
    names = launch.kernel.arg_names
    positional = names[: len(launch.signature)]
    constants = dict(launch.constants)
    types = ["i32" if kind == DIVISIBLE else kind for kind in launch.signature]
    signature = dict(zip(positional, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    attributes = {}
    for i, kind in enumerate(launch.signature):
        paths = [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
        if kind not in ("i32", "fp32"):
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(
        launch.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = dict(launch.options)
    if target.backend != "cuda":
        options.pop("maxnreg", None)
    kernel = triton.compile(source, target=target, options=options)
    if target.backend != "cuda":
        return Compiled(0, 0, kernel.metadata.shared, kernel.asm["amdgcn"])
    cubin = kernel.asm["cubin"]
    text = machine_code.dump(cubin, "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return Compiled(registers, stack, kernel.metadata.shared, kernel.asm["ptx"], cubin)


def pooling_launches(d, depths, dtype):
    """The distinct launches of all pooling operations, forward and backward, on a packed and a shared layout."""
    layouts = (
        ak.SequenceLayout.packed([3, 2], [4, 70]),
        ak.SequenceLayout.shared_prompts([3], [[2, 4]]),
    )
    with recorded_launches() as found:
        for layout in layouts:
            batch, tables, length = layout.num_sequences, layout.tables, layout.max_length
            states = [torch.zeros(layout.num_tokens, d, dtype=dtype) for _ in range(depths)]
            hidden, w, b = states[0], torch.zeros(d, dtype=dtype), torch.zeros(1, dtype=dtype)
            gate = torch.zeros(depths, d, dtype=dtype), torch.zeros(depths, dtype=dtype)
            alpha, grad, lse = torch.zeros(batch, depths), torch.zeros(batch, d), torch.zeros(batch)
            rest = (w, b, grad, lse, tables, length, False)
            pooling.multi_view_pool_forward(states, alpha, w, b, tables, length, False)
            pooling.multi_view_pool_backward(grad, grad, grad, states, alpha, *rest)
            pooling.attention_pool_forward(hidden, w, b, tables, length, False)
            pooling.attention_pool_backward(grad, hidden, *rest)
            pooling.depth_gate_forward(hidden, *gate, tables, length)
            pooling.spread_means(tables, length, dtype, prompt=grad, everything=grad)
            for which in ("response", "prompt", "all"):
                pooling.masked_mean_pool_forward(hidden, tables, length, which)
                mean = {"everything" if which == "all" else which: grad}
                pooling.spread_means(tables, length, dtype, **mean)
    return list(found)


def attention_launches(head_size, dtype, key_heads=8, queries="all", causal=True):
    """The launches of attention with 8 query heads, forward and backward, keys and values merged."""
    layout = ak.SequenceLayout.packed([3], [2])
    tables = layout.attention if queries == "all" else layout.response_attention
    query = torch.zeros(5 if queries == "all" else 2, 8, head_size, dtype=dtype)
    key, value = torch.zeros(5, 2, key_heads, head_size, dtype=dtype).unbind(1)
    how = (tables, causal, head_size**-0.5)
    with recorded_launches() as found:
        out, log_sum_exp = refinement.sequence_attention_forward(query, key, value, *how, False)
        refinement.sequence_attention_backward(
            out, out, log_sum_exp, query, key, value, query, key, value, *how
        )
    return list(found)


def row_launches(d, dtype):
    """The launches of the norm and the SwiGLU over rows of `d` features, forward and backward."""
    x, weight = torch.zeros(5, d, dtype=dtype), torch.zeros(d)
    with recorded_launches() as found:
        for update in (None, x):
            refinement.residual_rms_norm_forward(x, update, weight, 1e-6)
            refinement.residual_rms_norm_backward(update, x, x, weight, 1e-6)
        if d % 2 == 0:
            refinement.swiglu_backward(refinement.swiglu_forward(x), x)
    return list(found)


def experts_launches(d, h, h_r, dtype, weight_dtype, rows=5):
    """The distinct launches of the gated expert combination, forward and backward, on views of `dtype`."""
    views = [torch.zeros(rows, d, dtype=dtype) for _ in range(4)]
    shapes = ((3, h, d), (3, h), (3, h), (3,), (h_r, 4 * d), (h_r,), (3, h_r), (3,))
    weights = [torch.zeros(shape, dtype=weight_dtype) for shape in shapes]
    grads = torch.zeros(rows), torch.zeros(rows, 3), torch.zeros(rows, 3)
    with recorded_launches() as found:
        experts.gated_expert_combination_forward(*views, weights)
        experts.gated_expert_combination_backward(*grads, *views, weights)
    return list(found)


def loss_launches(dtype=torch.float32, others=torch.float32):
    """The distinct launches of the loss: bare, with all its terms, and with gradients."""
    rewards, weight, pi = (
        torch.zeros(5, dtype=dtype),
        torch.zeros(5, dtype=others),
        torch.zeros(9, 3, dtype=others),
    )
    with recorded_launches() as found:
        for optional in ((None, None), (weight, pi)):
            for gradients in (False, True):
                loss.focal_bradley_terry_loss_forward(
                    rewards, rewards, *optional, 2.0, 1.0, 0.5, 0.1, gradients
                )
    return list(found)


_VARIANTS = {  # constants that tell the launches of a kernel apart, as a reader would call them
    "VIEWS": "three views",
    "SHARED": "shared prompts",
    "ATTENTION": "attention",
    "LAST": "last",
    "PROMPT_SUM": "prompt sum",
    "RESPONSE_SUM": "response sum",
    "PROMPT_MEAN": "prompt mean",
    "RESPONSE_MEAN": "response mean",
    "ALL_MEAN": "mean of all",
    "UPDATE": "with addition",
    "ENTROPY": "weighted pairs, entropy floor",
    "GRADIENTS": "gradients",
}


def resource_table(launches, step_name, step):
    """Markdown: registers a thread and shared memory a block of every launch, by architecture. None of them spills.

    `step` writes a launch's step, of which `step_name` says what it consists of, from its constants.
    """
    lines = [
        f"| kernel | variant | {step_name}, warps | " + " | ".join(f"sm_{arch}" for arch in NVIDIA) + " |",
        "| --- | --- | --- |" + " --- |" * len(NVIDIA),
    ]
    for launch in launches:
        constants = dict(launch.constants)
        variant = ", ".join(text for name, text in _VARIANTS.items() if constants.get(name))
        cells = [f"`{launch.name}`", variant, f"{step(constants)}, {dict(launch.options)['num_warps']}"]
        for target in NVIDIA.values():
            compiled = compile_launch(launch, target)
            cells.append(f"{compiled.registers}, {compiled.shared / 1024:.1f} KiB")
        line = "| " + " | ".join(cells) + " |"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def pooling_table():
    """The table of docs/triton-pooling.md."""

    def step(constants):
        return f"{constants.get('TOKENS', constants.get('ROWS', 1))} x {constants.get('BLOCK', 1)}"

    return resource_table(pooling_launches(4096, 3, torch.bfloat16), "tokens x features", step)


PASSES = {  # over the states: constants that tell them from the kernels' other uses
    "multi_view_pool": ("scan", {"LAST": True}),
    "its backward": ("scan_backward", {"VIEWS": True, "SHARED": False}),
    "depth_gate": ("scan", {"PROMPT_SUM": True, "RESPONSE_SUM": True}),
}


def pass_over_states(d, operation):
    """The compilation for sm_90 of an operation's pass over states of bf16, K = 3, and the share of an H200's issue slots
    that its loop takes where its bytes move at the bandwidth of a copy."""
    kernel, marks = PASSES[operation]
    launch = next(
        launch
        for launch in pooling_launches(d, 3, torch.bfloat16)
        if launch.name == kernel and marks.items() <= dict(launch.constants).items()
    )
    compiled, constants = compile_launch(launch, NVIDIA[90]), dict(launch.constants)
    moved = constants["K"] * constants["TOKENS"] * min(d, constants["BLOCK"]) * torch.bfloat16.itemsize
    moved *= 2 if kernel == "scan_backward" else 1
    instructions = len(compiled.loop) * dict(launch.options)["num_warps"]
    return compiled, machine_code.issue_slots(instructions, moved)


def instructions_table():
    """The other table of docs/triton-pooling.md."""
    lines = [
        f"| d | {' | '.join(f'`{x}`' if '_' in x else x for x in PASSES)} |",
        "| --- |" + " --- |" * len(PASSES),
    ]
    for d in (1024, 2048, 2560, 4096, 8192):
        shares = [pass_over_states(d, operation)[1] for operation in PASSES]
        lines.append(f"| {d} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |")
    return "\n".join(lines)


def experts_table(weight_dtype):
    """A table of docs/triton-experts.md: fp32 views, as the pooling gives them."""

    def step(constants):
        features = constants.get("PIECES", 1) * constants.get("WIDTH", 0)
        sizes = (constants.get("ROWS", 1), constants["UNITS"], features or "-")
        return " x ".join(map(str, sizes))

    launches = experts_launches(4096, 256, 256, torch.float32, weight_dtype)
    return resource_table(launches, "rows x units x features", step)


def loss_table():
    """The other table of docs/triton-experts.md."""
    return resource_table(loss_launches(), "pairs", lambda constants: constants["BLOCK"])


def refinement_table():
    """The table of docs/head.md: attention with 8 heads of 128 features, norm and SwiGLU of 4096, bf16."""

    def step(constants):
        sizes = [constants[name] for name in ("M", "N", "TOKENS", "ROWS", "BLOCK") if name in constants]
        return " x ".join(map(str, sizes))

    launches = [*attention_launches(128, torch.bfloat16), *row_launches(4096, torch.bfloat16)]
    return resource_table(launches, "queries x keys, or rows x features", step)


if __name__ == "__main__":
    tables = pooling_table(), instructions_table(), refinement_table()
    tables += experts_table(torch.float32), experts_table(torch.bfloat16), loss_table()
    print("\n\n".join(tables))
