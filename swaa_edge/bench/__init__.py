"""Benchmarks: SWAA configurations against full attention, and our attention kernels against llama.cpp's.

report = bench("model.gguf", "quality,fast", [4096, 8192]); print(report)
report = bench_attention("model.gguf", quick=True); report.to_dict()["decode_vs_no_flash"]
"""

from swaa_edge.bench.attention import bench_attention
from swaa_edge.bench.attention_report import AttentionReport
from swaa_edge.bench.report import Report, plot
from swaa_edge.bench.run import bench

__all__ = ["AttentionReport", "Report", "bench", "bench_attention", "plot"]
