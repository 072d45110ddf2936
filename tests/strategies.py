"""What property tests draw from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from tensors import ACCUMULATOR_LAYOUTS, INPUT_LAYOUTS

input_layouts = st.sampled_from(INPUT_LAYOUTS)
accumulator_layouts = st.sampled_from(ACCUMULATOR_LAYOUTS)
dtypes = st.sampled_from((torch.float32, torch.float64))
# Also what an accumulator takes as input, and what does not survive narrow accumulation.
input_dtypes = st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))
alphas = st.sampled_from((1.0, -0.75, 0.0, 1 / 3))
seeds = st.integers(0, 2**16)
