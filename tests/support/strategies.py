"""Hypothesis strategies: any sound SwaaConfig, any layer spec."""

from hypothesis import strategies as st

from swaa_edge.config import SwaaConfig
from swaa_edge.layers import INT32_MAX

specs = st.one_of(st.lists(st.integers(0, 40)), st.sampled_from(["none", "all", "1::2", "::3", "-4:", "2:9", "::-1"]))


configs = st.builds(
    SwaaConfig,
    st.integers(1, INT32_MAX),
    st.integers(0, INT32_MAX),
    specs,
    st.one_of(st.booleans(), specs),
    recipe=st.sampled_from(["custom", "quality", "my recipe"]),
    adapter=st.sampled_from([None, "lora-7"]),
)
