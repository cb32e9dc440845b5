"""The sizes that GEMMs and linear layers are measured at: (tokens, input width, output width) by name."""

from __future__ import annotations

SQUARES = {f"square {n}": (n, n, n) for n in (1024, 2048, 4096, 8192)}

LLAMA_8B = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
"""Input and output width of the linear layers of Llama-3 8B (model card's config: hidden 4096, 8 key-value heads of 128, 14336)."""

LLAMA = {f"{name}, {t} tokens": (t, *widths) for t in (4096, 8192, 16384, 32768) for name, widths in LLAMA_8B.items()}

TRANSFORMER_ENGINE = {"TE up": (15872, 4096, 16384), "TE down": (15872, 16384, 4096)}
"""The MLP of TransformerEngine's published figures on an H200: hidden 4096, ffn 16384, 15872 tokens."""

SETS = {"squares": SQUARES, "llama": LLAMA, "te": TRANSFORMER_ENGINE}


def selected(sets: str, shapes: str | None = None) -> dict[str, tuple[int, int, int]]:
    """Those of the sets, by name with commas between; `shapes` replaces them: "256x64x48" is tokens x input x output.

    Errors: `ValueError` for a name or a shape that is none.
    """
    if shapes is not None:
        found = {text: tuple(map(int, text.split("x"))) for text in shapes.split(",")}
        for text, sizes in found.items():
            if len(sizes) != 3:
                raise ValueError(f"--shapes: {text!r} is not tokens x input width x output width, such as 8192x4096x4096")
        return found  # type: ignore[return-value]
    unknown = set(sets.split(",")) - set(SETS)
    if unknown:
        raise ValueError(f"--sets: {', '.join(sorted(unknown))}: unknown; choose from {', '.join(SETS)}")
    return {name: sizes for key in sets.split(",") for name, sizes in SETS[key].items()}
