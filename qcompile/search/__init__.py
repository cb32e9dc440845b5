"""A recipe from measurements: which GEMM of which layer in how many bits, under a budget."""

from qcompile.search.result import SearchResult, Totals
from qcompile.search.search import Search, search_recipe

__all__ = ["Search", "SearchResult", "Totals", "search_recipe"]
