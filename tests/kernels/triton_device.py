"""Where the tests of Triton kernels run: on the GPU if there is one, else on CPU tensors in Triton's interpreter."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter runs on NumPy, which warns where a GPU is silent, and (Triton 3.6) of what NumPy 2.4 refuses.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
