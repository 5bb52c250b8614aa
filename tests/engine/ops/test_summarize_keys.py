"""The summary of a prompt's keys against fp64, sums added to what was there."""

from dataclasses import dataclass

import pytest
import torch

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.configuration import SHARED_MEMORY
from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.ops.summarize_keys import summarize_keys_workspace
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation, rotate
from tests.engine.ops.checks import assert_as_exact, poisoned, run_compiler

HALF = RotaryLayout(style="half", rotary_dim=32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """Post-RoPE keys [H, n, D], their angles [n, P], weights [W] or None."""

    keys: torch.Tensor
    rotation: Rotation | None
    layout: RotaryLayout | None
    weights: torch.Tensor | None
    chunk_size: int

    def to(self, dtype: torch.dtype) -> "Prompt":
        """The same numbers in another dtype; angles stay."""
        return Prompt(**{**vars(self), "keys": self.keys.to(dtype)})


def random_prompt(
    num_tokens: int,
    *,
    layout: RotaryLayout | None = HALF,
    num_heads: int = 2,
    head_dim: int = 32,
    chunk_size: int = 8,
    dtype: torch.dtype = torch.float32,
    weighted: bool = False,
    scaling: float = 1.0,
    device: torch.device,
) -> Prompt:
    """Keys as a cache gets them: a token's heads side by side, rotated by angles scaled as YaRN scales them."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(num_tokens, num_heads, head_dim, generator=generator).transpose(0, 1) + 0.5
    rotation = None
    if layout is not None:
        angles = 100 * torch.randn(num_tokens, layout.rotary_dim // 2, generator=generator)
        rotation = Rotation((scaling * angles.cos()).to(device), (scaling * angles.sin()).to(device))
        keys = rotate(keys.contiguous(), Rotation(angles.cos(), angles.sin()), layout) * scaling
        keys = keys.transpose(0, 1).contiguous().transpose(0, 1)
    weights = torch.rand(num_heads * head_dim, generator=generator).to(device) + 0.5 if weighted else None
    return Prompt(keys=keys.to(device, dtype), rotation=rotation, layout=layout, weights=weights, chunk_size=chunk_size)


def summarize(prompt: Prompt, backend: str) -> dict[str, torch.Tensor]:
    """All outputs, poisoned before but for the sums, which begin at 1."""
    num_heads, num_tokens, head_dim = prompt.keys.shape
    width, num_chunks = num_heads * head_dim, num_tokens // prompt.chunk_size
    dtype, device = prompt.keys.dtype, prompt.keys.device
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = {
        "plain": poisoned(num_tokens, width, dtype=dtype, device=device),
        "landmarks": poisoned(num_heads, num_chunks, head_dim, dtype=sums, device=device),
        "min_cosine": poisoned(num_heads, num_chunks, dtype=sums, device=device),
        "gram": torch.ones(width, width, dtype=sums, device=device),
        "key_sum": torch.ones(width, dtype=sums, device=device),
    }
    size = summarize_keys_workspace(num_heads, num_tokens, head_dim, prompt.chunk_size)
    implementation("summarize_keys", backend, device)(
        prompt.keys,
        None if prompt.rotation is None else prompt.rotation.cos,
        None if prompt.rotation is None else prompt.rotation.sin,
        RotaryStyle.of(prompt.layout),
        0 if prompt.layout is None else prompt.layout.rotary_dim,
        prompt.chunk_size,
        prompt.weights,
        *outputs.values(),
        poisoned(size, dtype=torch.float32, device=device),
    )
    return outputs


def check(prompt: Prompt, backend: str) -> None:
    result, reference = summarize(prompt, backend), summarize(prompt, "reference")
    expected = summarize(prompt.to(torch.float64), "reference")
    for name, exact in expected.items():
        size = float(exact.abs().max())
        assert_as_exact(result[name], reference[name], exact, absolute=1e-6 * max(size, 1))
    assert torch.equal(result["gram"], result["gram"].T)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_tokens", [8, 56, 504, 2 * 2048 + 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_summary_of_any_length(
    dtype: torch.dtype, num_tokens: int, weighted: bool, backend: str, device: torch.device
) -> None:
    check(random_prompt(num_tokens, dtype=dtype, weighted=weighted, device=device), backend)


@pytest.mark.parametrize(
    ("layout", "head_dim", "num_heads"),
    [
        (None, 64, 1),
        (RotaryLayout(style="half", rotary_dim=16), 64, 3),
        (RotaryLayout(style="half", rotary_dim=80), 80, 2),
        (RotaryLayout(style="interleaved", rotary_dim=48), 96, 1),
        (RotaryLayout(style="interleaved", rotary_dim=128), 128, 1),
        (RotaryLayout(style="half", rotary_dim=192), 192, 2),
        (RotaryLayout(style="half", rotary_dim=64), 256, 1),
    ],
)
def test_every_rotation_and_head_dim(
    layout: RotaryLayout | None, head_dim: int, num_heads: int, backend: str, device: torch.device
) -> None:
    check(random_prompt(72, layout=layout, head_dim=head_dim, num_heads=num_heads, device=device), backend)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_every_chunk_size(chunk_size: int, backend: str, device: torch.device) -> None:
    check(random_prompt(7 * chunk_size, chunk_size=chunk_size, scaling=1.35, device=device), backend)


def test_a_key_that_lies_across_its_chunk_shows(backend: str, device: torch.device) -> None:
    prompt = random_prompt(24, device=device)
    prompt.keys[1, 8:16] = prompt.keys[1, 8]
    prompt.keys[1, 9] *= -1
    cosine = summarize(prompt, backend)["min_cosine"]
    assert cosine[1, 1] == pytest.approx(-1) and cosine[:, [0, 2]].min() > -1


def test_keys_that_loads_cannot_be_aligned_to_are_refused(device: torch.device) -> None:
    from longshadow.engine.ops.summarize_keys.triton_kernel import summarize_keys

    keys = torch.zeros(1, 8, 40, device=device)[:, :, 4:36]
    nothing = torch.zeros(0, device=device)
    with pytest.raises(ValueError, match=r"multiples of 16 elements.*\(320, 40, 1\)"):
        summarize_keys(keys, None, None, 0, 0, 8, None, *[nothing] * 6)


def test_opcheck(device: torch.device) -> None:
    prompt = random_prompt(16, device=device)
    assert prompt.rotation is not None
    arguments = (prompt.keys, prompt.rotation.cos, prompt.rotation.sin, 1, 32, 8, None)
    outputs = tuple(summarize(prompt, "reference").values())
    workspace = torch.zeros(summarize_keys_workspace(2, 16, 32, 8), device=device)
    torch.library.opcheck(torch.ops.longshadow.summarize_keys.default, (*arguments, *outputs, workspace))


def test_it_compiles_for_every_device() -> None:
    printed = run_compiler(
        "from longshadow.engine.ops.configuration import compile_ahead_of_time\n"
        "from longshadow.engine.ops.summarize_keys.triton_kernel import CONFIGURATIONS\n"
        "for capability in (80, 90, 100):\n"
        "    print(compile_ahead_of_time(CONFIGURATIONS[0], capability).metadata.shared)\n"
    )
    sizes = [int(line) for line in printed.split()]
    assert len(sizes) == 3 and max(sizes) <= SHARED_MEMORY
