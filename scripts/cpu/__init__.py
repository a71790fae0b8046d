"""The parts of scripts/cpu_bench.py: what is measured in which order, attention's seconds out of times, the machine's
roofline, and what all of it says.

    from cpu.fit import attention_seconds
"""
