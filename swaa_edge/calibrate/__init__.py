"""Which layers should keep full attention, found by the engine itself on the quantized model; no torch.

cases (samples or a text, in tokens), losses (of right answers under a choice of layers), search (rankings and
greedy refinement), report (rows, plot), recommend (a choice among configurations that `eval` measured). `swaa-edge
calibrate` and `swaa-edge recommend` are all of it.

    from swaa_edge.calibrate.search import calibrate
    report = calibrate(load, SwaaConfig(2048, 100, fa_decode=True), n_layers, cases, keep=9)
"""
