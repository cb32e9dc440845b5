"""Which sites a pattern means.

A site is named by its module, `layers.0.mlp.up_proj`, perhaps with the operator inside it,
`layers.0.attn:bmm_1`, and with the number of the call if the module is called again, `proj#1`.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

OP_KINDS = ("linear", "conv", "bmm")
"""Kinds of sites: products with a weight, convolutions, products of two activations."""

KIND_PATTERNS = tuple(f"op={kind}" for kind in OP_KINDS)
"""Patterns that mean all sites of a kind."""


def matches(pattern: str, site: str, kind: str | None = None) -> bool:
    """Whether `pattern` (shell style: `*`, `?`, `[...]`; `*` crosses dots) means `site`, or is "op=" and its kind.

    It may match the full name, the name of the site without the number of the call, or the name of a module
    that the site lies in: "layers.0" means "layers.0.mlp.up_proj", and not "layers.01".
    """
    if pattern in KIND_PATTERNS:
        return pattern == f"op={kind}"
    without_call = site.partition("#")[0]
    module = without_call.partition(":")[0]
    parts = module.split(".")
    names = [site, without_call, *(".".join(parts[:count]) for count in range(len(parts), 0, -1))]
    return any(fnmatchcase(name, pattern) for name in names)
